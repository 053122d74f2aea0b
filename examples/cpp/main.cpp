// Runs an int8 language model from C++: no Python, no model source.
//
//   run_package MODEL.aoti.pt2 TOKEN...
//
// prints the logits of the last token, one a line. README.md tells how the package is made and this is built.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace {

// Whether this CPU has the vectors that the package's generated code was compiled with; the loader does not look.
bool runs_here(const std::string& package) {
#if defined(__x86_64__) && defined(__GNUC__)
  const auto metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(package, "model");
  const auto found = metadata.find("AOTI_CPU_ISA");
  const std::string isa = found == metadata.end() ? "" : found->second;
  if (isa.find("AVX512") != std::string::npos) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
  }
  return isa.find("AVX2") == std::string::npos || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#else
  return true;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s MODEL.aoti.pt2 TOKEN...\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> tokens;
  for (int i = 2; i < argc; ++i) {
    tokens.push_back(std::atoll(argv[i]));
  }
  try {
    if (!runs_here(argv[1])) {
      std::fprintf(stderr, "%s was compiled for a CPU with wider vectors than this one's\n", argv[1]);
      return 1;
    }
    c10::InferenceMode no_gradients;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    // The program's tensor inputs in their order, here input_ids [batch, sequence]; what comes back is flat as well.
    const std::vector<at::Tensor> outputs = model.run({at::tensor(tokens, at::kLong).unsqueeze(0)});
    const at::Tensor logits = outputs.at(0).select(0, 0).select(0, -1).to(at::kFloat).contiguous();
    for (int64_t i = 0; i < logits.numel(); ++i) {
      std::printf("%.9g\n", logits.const_data_ptr<float>()[i]);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
