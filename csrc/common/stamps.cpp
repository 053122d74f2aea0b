// Whether tensors are what they were: the check a compiled graph makes of all its float weights at each call.
//
// The meaning is that of Stamp in int8compile/weights/stamps.py, where it is explained: same tensor, same version, same
// memory read in the same way, and the same bytes at a few places of it.
// It is here because a model has hundreds of weights and a decoded token few microseconds for them.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/DimVector.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kSamples = 2;
constexpr int64_t kSampleBytes = 64;  // a cache line: reading one byte of it costs as much as reading all

// Calls visit(i, pointer, size) for some pieces of the tensor's memory until it returns false, and returns whether it
// never did. No pieces where there is no telling: on GPUs, and where memory is not in one piece, or was released.
template <typename Visit>
bool for_each_sample(const at::Tensor& t, const char* storage, Visit visit) {
  if (storage == nullptr || !t.device().is_cpu() || !t.is_non_overlapping_and_dense()) {
    return true;
  }
  const char* begin = storage + t.storage_offset() * t.element_size();
  const int64_t size = t.numel() * t.element_size();
  for (int i = 0; i < kSamples; ++i) {
    int64_t start = size * (2 * i + 1) / (2 * kSamples);
    start = std::max<int64_t>(0, start - int64_t(reinterpret_cast<uintptr_t>(begin + start) % kSampleBytes));
    if (!visit(i, begin + start, std::min(kSampleBytes, size - start))) {
      return false;
    }
  }
  return true;
}

struct Stamp {
  // Weak, so that nothing is kept alive; and held, so that no other object can come to have the same address.
  c10::weak_intrusive_ptr<c10::TensorImpl, at::UndefinedTensorImpl> tensor;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  int64_t offset;
  int64_t version;  // -1: an inference tensor, which has none
  c10::ScalarType dtype;
  c10::DimVector sizes, strides;
  std::array<std::array<char, kSampleBytes>, kSamples> samples{};

  explicit Stamp(const at::Tensor& t)
      : tensor(t.getIntrusivePtr()),
        storage(t.storage().getWeakStorageImpl()),
        data(memory(t)),
        offset(t.storage_offset()),
        version(version_of(t)),
        dtype(t.scalar_type()),
        sizes(t.sizes()),
        strides(t.strides()) {
    for_each_sample(t, static_cast<const char*>(data), [&](int i, const char* piece, int64_t size) {
      std::memcpy(samples[i].data(), piece, size);
      return true;
    });
  }

  bool matches(const at::Tensor& t) const {
    if (tensor._unsafe_get_target() != t.unsafeGetTensorImpl() ||
        storage._unsafe_get_target() != t.storage().unsafeGetStorageImpl() || data != memory(t) ||
        offset != t.storage_offset() || version != version_of(t) || dtype != t.scalar_type() || t.sizes() != sizes ||
        t.strides() != strides) {
      return false;
    }
    const auto held = storage.lock();  // another thread may give the tensor other memory while this one reads
    return held && same_samples(t);
  }

  bool same_samples(const at::Tensor& t) const {
    return for_each_sample(t, static_cast<const char*>(data), [&](int i, const char* piece, int64_t size) {
      return std::memcmp(samples[i].data(), piece, size) == 0;
    });
  }

  // Read past the checks: that of a released weight (release_storage.cpp) would raise.
  static const void* memory(const at::Tensor& t) {
    return t.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get();
  }

  static int64_t version_of(const at::Tensor& t) {
    return t.is_inference() ? -1 : int64_t(t._version());
  }
};

struct Stamps : torch::CustomClassHolder {
  explicit Stamps(const c10::List<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors.vec()) {
      stamps.emplace_back(tensor);
    }
  }

  bool match(const c10::List<at::Tensor>& tensors) const {
    if (tensors.size() != stamps.size()) {
      return false;
    }
    for (size_t i = 0; i < stamps.size(); ++i) {
      if (!stamps[i].matches(tensors.get(i))) {
        return false;
      }
    }
    return true;
  }

  std::vector<Stamp> stamps;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(int8compile_native, m) {
  m.class_<Stamps>("Stamps").def(torch::init<const c10::List<at::Tensor>&>()).def("match", &Stamps::match);
}
