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
#include <vector>

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
