"""A float model and the same model in int8."""

import torch

import int8compile

model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).eval()
x = torch.randn(8, 256)
with torch.inference_mode():
    y = torch.compile(model, backend="int8")(x)
    print(f"relative error {(y - model(x)).norm() / model(x).norm():.3f}")
print(int8compile.last_report())
