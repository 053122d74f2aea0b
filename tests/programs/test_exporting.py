"""``export``: the compiled model's numbers, standard names, no float weights, and nothing of the user's changed."""

import dataclasses
import inspect
import operator
from collections import namedtuple

import pytest
import torch
from compiling import compile_eager, int8_linear
from gold import BF16_BOUND, FP32_BOUND, relative_error
from model_zoo import ZOO, BrokenByTorchError, check_traceable, eagerly, output, tokens
from torch import nn
from torch.nn import functional as F

import int8compile
from int8compile.errors import ExportError, OptionValueError
from int8compile.ops import linear, quantize_weight, scaled_mm
from int8compile.programs.exporting import joined_path
from int8compile.report import Reason

EVERYTHING = {"min_features": 0}
ENTRIES = {entry.name: entry for entry in ZOO}
BY_DEFAULT = ("Llama", "GPT-2", "Falcon", "BERT", "ViT", "T5")
# Dynamo writes into its graph what torch.export puts into a nested one, or has one call for what are several here.
DIFFERENT = ("TransformerEncoder", "TransformerEncoder, SiLU", "MLP, one linear in autocast")


class Block(nn.Module):
    """q, k and v of one activation, a [K, N] weight, a linear of its own, and one that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.q, self.attn.k, self.attn.v = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.mix = nn.Parameter(torch.randn(32, 24))
        self.out, self.head = nn.Linear(24, 16), nn.Linear(16, 16)

    def forward(self, x):
        attn = self.attn
        return self.head(x + self.out(torch.cat([attn.q(x), attn.k(x), attn.v(x)], -1) @ self.mix))


def kinds(program) -> list[str]:
    ours = (linear, scaled_mm)
    return [str(node.target) for node in program.graph.nodes if node.target in (*ours, torch.ops.aten.linear.default)]


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=[] if entry.name in BY_DEFAULT else pytest.mark.slow, id=entry.name)
        for entry in ZOO
        if entry.name not in DIFFERENT and not entry.breaks
    ],
)
def test_models_give_what_they_give_compiled(entry):
    model, inputs = entry.make()
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    program = int8compile.export(model, (), {**inputs, **cache}, config=entry.all_options)
    report = int8compile.last_report()
    assert (report.rewritten, {site.reason for site in report.sites if not site.rewritten}) == (
        entry.int8,
        set(entry.left),
    )
    try:
        check_traceable(entry)
    except BrokenByTorchError as error:
        pytest.skip(str(error))
    with torch.no_grad(), entry.context():
        expected = output(torch.compile(model, backend=eagerly(entry))(**inputs))
        actual = output(program.module()(**inputs, **cache))
    # Float products depend on how memory is aligned, and the last bit of one can move an activation to another code.
    assert relative_error(actual, expected) <= (BF16_BOUND if entry.autocast else FP32_BOUND)
    assert [(site.path, site.reason) for site in report.sites if site.reason is not Reason.NOT_CONSTANT] == [
        (site.path, site.reason)
        for site in int8compile.last_report().sites
        if site.reason is not Reason.NOT_CONSTANT  # these have no name of their own
    ]


def test_buffers_keep_the_modules_path_and_float_weights_are_gone():
    model = Block().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 16)
    program = int8compile.export(model, (x,), config={**EVERYTHING, "llm_int8_skip_modules": ["head"]})
    assert {name: (value.dtype, tuple(value.shape)) for name, value in program.state_dict.items()} == {
        "attn.q.bias": (torch.float32, (16,)),
        "attn.v.bias": (torch.float32, (8,)),
        "out.bias": (torch.float32, (16,)),
        "head.weight": (torch.float32, (16, 16)),
        "head.bias": (torch.float32, (16,)),
        "attn.q_k_v.weight_int8": (torch.int8, (32, 16)),
        "attn.q_k_v.weight_scale": (torch.float32, (32,)),
        "mix_int8": (torch.int8, (24, 32)),
        "mix_scale": (torch.float32, (24,)),
        "out.weight_int8": (torch.int8, (16, 24)),
        "out.weight_scale": (torch.float32, (16,)),
    }
    codes, scale = quantize_weight(model.mix.detach().t())
    assert torch.equal(program.state_dict["mix_int8"], codes)
    assert torch.equal(program.state_dict["mix_scale"], scale)
    buffers = dict(program.module().named_buffers())
    assert torch.equal(buffers["attn.q_k_v.weight_int8"][16:24], quantize_weight(model.attn.k.weight.detach())[0])
    # The user's model is as it was, gradients included; what the program shares with it wants none.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(value.requires_grad for value in program.state_dict.values())
    assert program.state_dict["head.weight"].data_ptr() == model.head.weight.data_ptr()
    actual = program.module()(x)
    assert not actual.requires_grad
    with torch.no_grad():
        compiled = compile_eager(model, llm_int8_skip_modules=["head"])
        torch.testing.assert_close(actual, compiled(x))


def test_decomposed_programs_and_programs_as_input():
    model, x = Block().eval().requires_grad_(False), torch.randn(3, 16)
    whole = torch.export.export(model, (x,))
    text = str(whole.graph)
    decomposed = whole.run_decompositions()
    assert torch.ops.aten.linear.default not in {node.target for node in decomposed.graph.nodes}
    programs = [int8compile.export(program, config=EVERYTHING) for program in (whole, decomposed)]
    for program in programs:
        assert int8compile.last_report().rewritten == 6
        assert kinds(program).count("aten.linear.default") == 0
    with torch.no_grad():
        expected = compile_eager(model)(x)
        for program in programs:
            torch.testing.assert_close(program.module()(x), expected)
    assert str(whole.graph) == text
    assert "out.weight" in whole.state_dict


def test_dynamic_batch_and_sequence():
    model = Block().eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = int8compile.export(
        model, (torch.randn(2, 5, 16),), dynamic_shapes=({0: dynamic, 1: dynamic},), config=EVERYTHING
    )
    assert len(program.range_constraints) == 2
    compiled = compile_eager(model)
    with torch.no_grad():
        for shape in ((2, 5, 16), (3, 1, 16), (1, 9, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), compiled(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.b.weight = self.a.weight
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.b(F.silu(self.a(self.table(ids)))))


def test_tied_weights_are_there_once():
    """(1) two linears share one int8 weight (2) one shared with an embedding stays float, under both its names
    (3) or comes in int8 as well, the embedding staying what it is."""
    model, ids = Tied().eval(), torch.tensor([[1, 2, 3]])
    program = int8compile.export(model, (ids,), config=EVERYTHING)
    assert [name for name in program.state_dict if "int8" in name] == ["a.weight_int8"]
    assert {name for name in program.state_dict if name.endswith("weight")} == {"table.weight", "head.weight"}
    assert int8compile.last_report().summary().startswith("2 of 3 linears, 1 left in float (OUTPUT_EMBEDDING head")
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids), compile_eager(model)(ids))
    both = int8compile.export(model, (ids,), config={**EVERYTHING, "skip_output_embeddings": False})
    assert {name for name in both.state_dict if "table" in name or "head.w" in name} == {
        "table.weight",
        "head.weight",
        "table.weight_int8",
        "table.weight_scale",
    }


def test_weights_only(tmp_path):
    model, x = Block().eval(), torch.randn(3, 16)
    config = {**EVERYTHING, "llm_int8_weight_only_modules": ["attn.q", "attn.v", "head"]}
    program = int8compile.export(model, (x,), config=config)
    policies = [node.args[5] for node in program.graph.nodes if node.target is linear]
    assert sorted(policies) == ["all", "all", "column", "column", "column"]
    int8compile.save(program, tmp_path / "block.pt2")
    with torch.no_grad():
        want = compile_eager(model, llm_int8_weight_only_modules=["attn.q", "attn.v", "head"])(x)
        torch.testing.assert_close(int8compile.load(tmp_path / "block.pt2").module()(x), want)


def test_stateful_models_keep_their_state():
    """A buffer that a call changes goes on changing, and is no constant for a linear that reads it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8, 8))

        def forward(self, x):
            self.mean.add_(x.t() @ x)
            return self.fc(x) @ self.mean.t()

    x = torch.randn(4, 8)
    for prepare in (lambda m: m, lambda m: torch.export.export(m, (x,)).run_decompositions()):
        model = Counting().eval()
        program = int8compile.export(prepare(model), *([(x,)] if prepare(model) is model else []), config=EVERYTHING)
        sites = int8compile.last_report().sites
        assert [site.reason for site in sites if site.path != "mean"][:1] == [Reason.REWRITTEN]
        assert sum(site.rewritten for site in sites) == 1
        run = program.module()
        expected = int8_linear(x, model.fc.weight, model.fc.bias).detach()
        torch.testing.assert_close(run(x), expected @ (x.t() @ x).t())
        torch.testing.assert_close(run(x), expected @ (2 * x.t() @ x).t())


def test_a_model_of_int8_modules_is_exported_as_it_is():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 4)).eval(), torch.randn(2, 8)
    with torch.no_grad():
        expected = compile_eager(model)(x)
    int8compile.quantize_(model, {**EVERYTHING, "llm_int8_skip_modules": ["2"]})
    program = int8compile.export(model, (x,), config=EVERYTHING)
    assert kinds(program) == ["int8compile.linear.default"] * 2
    assert {value.dtype for name, value in program.state_dict.items() if name.startswith("0.weight")} == {
        torch.int8,
        torch.float32,
    }
    torch.testing.assert_close(program.module()(x), expected)


def test_outputs_of_a_librarys_own_class_become_dicts():
    entry = ENTRIES["Llama"]
    model, _ = entry.make()
    program = int8compile.export(model, (), {"input_ids": tokens(), "use_cache": False}, config=EVERYTHING)
    out = program.module()(input_ids=tokens(), use_cache=False)
    assert type(out) is dict
    assert list(out) == ["logits"]


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Record:
    first: torch.Tensor
    nothing: torch.Tensor | None = None
    second: torch.Tensor | None = None


torch.export.register_dataclass(Record)


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        y = self.fc(x)
        return Pair(y, [Record(y, second=x)]), torch.max(y, 0)


def test_named_tuples_become_tuples_and_dataclasses_dicts(tmp_path):
    model, x = Outputs().eval(), torch.randn(3, 16)
    program = int8compile.export(model, (x,), config=EVERYTHING)
    int8compile.save(program, tmp_path / "m.pt2")
    for each in (program, int8compile.load(tmp_path / "m.pt2", "reference")):
        (first, [record]), (values, indices) = out = each.module()(x)
        assert {type(out), type(out[0]), type(out[1])} == {tuple}
        assert list(record) == ["first", "second"]
        assert torch.equal(first, record["first"])
        assert torch.equal(values, first.gather(0, indices[None])[0])
        assert torch.equal(record["second"], x)


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, pair):
        return self.fc(pair.first) + pair.second


def test_inputs_in_a_class_without_a_name_for_files_are_refused(tmp_path):
    program = int8compile.export(Inputs(), (Pair(torch.randn(3, 16), torch.ones(8)),), config=EVERYTHING)
    with pytest.raises(ExportError, match="without a name for files; export the model with tuples and dicts"):
        int8compile.save(program, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_taken_is_named():
    model, x = Block(), torch.randn(1, 16)
    with pytest.raises(ExportError, match=r"model is builtin_function_or_method; expected a torch\.nn\.Module"):
        int8compile.export(operator.add, (x,))
    with pytest.raises(ExportError, match=r"args is Tensor; expected a tuple, such as \(x,\)"):
        int8compile.export(model, x)
    with pytest.raises(ExportError, match="leave args, kwargs and dynamic_shapes out"):
        int8compile.export(torch.export.export(model, (x,)), (x,))
    with pytest.raises(OptionValueError, match="release_weights=True"):
        int8compile.export(model, (x,), config={"release_weights": True})
    with pytest.raises(ExportError, match=r"has size 0 or 1 in args.*take example inputs of size 2 or more"):
        int8compile.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.device("meta"), pytest.raises(ExportError, match=r"mix is on the meta device"):
        int8compile.export(Block(), (x,))
    llama = ENTRIES["Llama"].make()[0]
    with pytest.raises(ExportError, match="'use_cache': False"):
        int8compile.export(llama, (), {"input_ids": tokens()})


def test_nested_linears_are_reported():
    model, x = ENTRIES["MLP, one linear in autocast"].make()[0], torch.randn(2, 7, 32)
    int8compile.export(model, (x,), config=EVERYTHING)
    assert [(s.path, s.reason.name) for s in int8compile.last_report().sites] == [
        ("up", "NESTED"),
        ("down", "REWRITTEN"),
    ]


@pytest.mark.parametrize(
    ("paths", "joined"),
    [
        (["a.q.weight"], "a.q.weight"),
        (["a.q.weight", "a.k.weight"], "a.q_k.weight"),
        (["layers.0.q.weight", "layers.1.q.weight"], "layers.0_1.q.weight"),
        (["a.wq", "a.wk"], "a.wq_wk"),
        (["q.weight", "block.k.weight"], "q_block_k.weight"),
        (["a.b", "a.b.c"], "a.b_b_c"),
        (["w"], "w"),
    ],
)
def test_names_of_joined_weights(paths, joined):
    assert joined_path(paths) == joined
