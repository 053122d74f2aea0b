"""Run with an installed wheel, outside of the checkout: is it whole, and does the backend work with no import of ours?

python check_wheel.py SITE_PACKAGES
"""

import sys
from importlib import metadata, resources
from pathlib import Path

import torch
from torch import nn

site = Path(sys.argv[1]).resolve()

assert "int8" in torch._dynamo.list_backends(), "torch.compile does not list the backend int8"
assert "int8compile" not in sys.modules, "listing the backends imported the package"
model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
x = torch.randn(4, 256)
with torch.no_grad():
    expected = model(x)
    actual = torch.compile(model, backend="int8")(x)
error = ((actual - expected).norm() / expected.norm()).item()
assert 0 < error < 0.05, f"relative error {error}: expected that of int8, above 0 and below 0.05"

import int8compile  # noqa: E402

assert Path(int8compile.__file__).resolve().is_relative_to(site), f"{int8compile.__file__} is not the wheel's"
report = int8compile.last_report()
assert report is not None, "the compile left no report"
assert report.rewritten == 2, f"expected 2 linears in int8:\n{report}"

files = [str(f) for f in metadata.files("int8compile") or [] if f.suffix != ".pyc"]
folders = {name.split("/")[0] for name in files if not name.startswith("..")}
ours = {"int8compile", f"int8compile-{int8compile.__version__}.dist-info"}
assert folders == ours, f"the wheel leaks {sorted(folders - ours)} into site-packages"
for part, suffix in (("passes", ".py"), ("csrc", ".cpp")):
    folder = resources.files(f"int8compile.{part}")
    assert Path(str(folder)).resolve().is_relative_to(site), f"int8compile.{part} is not the wheel's: {folder}"
    inside = [f for f in files if f.startswith(f"int8compile/{part}/") and f.endswith(suffix)]
    assert inside, f"the wheel has no *{suffix} in int8compile/{part}"
print(f"wheel: {len(files)} files, 2 of 2 linears in int8, relative error {error:.4f}")
