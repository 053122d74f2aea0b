// Frees a tensor's storage and makes every later access to its data raise `message`.
//
// Resizing the storage to nothing is not enough: eager operators that read it would dereference a null pointer.
// c10 has a switch for this on the storage itself, which Python cannot reach in every build of torch. The nominal
// size stays, because views check it before they look at the data.

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <torch/library.h>

#include <string>

namespace {

void release_storage(const at::Tensor& tensor, const std::string message) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  TORCH_CHECK(
      storage->nbytes() == tensor.numel() * tensor.element_size(),
      "release_storage: the tensor holds ", tensor.numel() * tensor.element_size(), " of its storage's ",
      storage->nbytes(), " bytes; freeing it would take data from another tensor");
  storage->set_data_ptr_noswap(at::DataPtr(nullptr, storage->device()));
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_(message);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(int8compile_native, m) {
  m.def("release_storage(Tensor(a!) tensor, str message) -> ()", &release_storage);
}
