"""What people do with a program: every way from a model to a file and back gives the exported model's numbers."""

import copy
import logging

import pytest
import torch
from compiling import compile_eager
from torch import nn
from torch.nn import functional as F

import int8compile

ANY = torch.export.Dim.DYNAMIC
EVERYTHING = {"min_features": 0}


class Net(nn.Module):
    """Keyword arguments, a dict of tensors among them; a dict, a list and a tuple come out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, *, extra=None):
        hidden = F.gelu(self.a(x))
        out = self.b(hidden if extra is None else hidden + extra["shift"])
        return {"out": out, "rest": [hidden, (out,)]}


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8 * 16, 10)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).flatten(1))


class Cached(nn.Module):
    """A key cache that each call fills further."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(32, 32)
        self.register_buffer("keys", torch.zeros(4, 32))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.keys.index_copy_(0, self.position.reshape(1), self.key(x))
        self.position.add_(1)
        return x @ self.keys.t()


def there_and_back(program, folder) -> torch.export.ExportedProgram:
    int8compile.save(program, folder / "ein mödel.pt2")
    return int8compile.load(folder / "ein mödel.pt2")


def check(model, program, *args, **kwargs) -> None:
    """A program's outputs against those of the same graph by way of torch.compile."""
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args, **kwargs), compile_eager(model)(*args, **kwargs))


def test_keyword_arguments_nested_outputs_and_sizes_that_change(tmp_path):
    model, shift = Net().eval(), {"shift": torch.randn(64)}
    shapes = {"x": {0: ANY, 1: ANY}, "extra": {"shift": None}}
    program = int8compile.export(model, (torch.randn(2, 5, 32),), {"extra": shift}, shapes, EVERYTHING)
    check(model, there_and_back(program, tmp_path), torch.randn(3, 7, 32), extra=shift)


def test_convolutions_and_batch_norm(tmp_path):
    model = Image().eval()
    program = int8compile.export(model, (torch.randn(2, 3, 4, 4),), None, ({0: ANY},), EVERYTHING)
    check(model, there_and_back(program, tmp_path), torch.randn(5, 3, 4, 4))


def test_a_cache_goes_on_from_where_it_was(tmp_path):
    model, x = Cached().eval(), torch.randn(1, 32)
    program = int8compile.export(copy.deepcopy(model), (x,), config=EVERYTHING)
    run, compiled = there_and_back(program, tmp_path).module(), compile_eager(model)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(x), compiled(x))
    assert run.position == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype, tmp_path):
    model, x = Net().eval().to(dtype), torch.randn(2, 5, 32, dtype=dtype)
    program = there_and_back(int8compile.export(model, (x,), config=EVERYTHING), tmp_path)
    assert program.module()(x)["out"].dtype is dtype
    check(model, program, x)


def test_autocast_where_a_program_runs(tmp_path):
    model, x = Net().eval(), torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        program = there_and_back(int8compile.export(model, (x,), config=EVERYTHING), tmp_path)
        check(model, program, x)
        assert program.module()(x)["out"].dtype is torch.bfloat16
    check(model, program, x)


def test_what_torch_makes_of_a_program(tmp_path):
    """(1) a deep copy (2) of its module (3) decompositions (4) another export (5) torch.export's own files
    (6) strict export before."""
    model, x = Net().eval(), torch.randn(2, 5, 32)
    program = int8compile.export(model, (x,), None, {"x": {0: ANY, 1: ANY}}, EVERYTHING)
    torch.export.save(program, tmp_path / "torch.pt2")
    programs = [
        copy.deepcopy(program),
        torch.export.export(copy.deepcopy(program.module()), (x,)),
        program.run_decompositions(),
        int8compile.export(torch.export.export(program.module(), (x,)), config=EVERYTHING),
        torch.export.load(tmp_path / "torch.pt2"),
        int8compile.export(torch.export.export(model, (x,), strict=True), config=EVERYTHING),
    ]
    for made in programs:
        check(model, there_and_back(made, tmp_path), x)


def test_a_programs_module_compiles(tmp_path):
    """Its linears are in int8 already, for any backend."""
    model, x = Net().eval(), torch.randn(2, 5, 32)
    module = there_and_back(int8compile.export(model, (x,), config=EVERYTHING), tmp_path).module()
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x), module(x))
    torch.testing.assert_close(compile_eager(module)(x), module(x))
    assert {site.reason.name for site in int8compile.last_report().sites} == {"PREQUANTIZED"}


def test_training_mode_is_warned_of(caplog):
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Dropout()), torch.randn(2, 32)
    with caplog.at_level(logging.WARNING, logger="int8compile"):
        int8compile.export(model, (x,), config=EVERYTHING)
    assert "the model is in training mode" in caplog.text
    caplog.clear()
    int8compile.export(model.eval(), (x,), config=EVERYTHING)
    assert "training mode" not in caplog.text
