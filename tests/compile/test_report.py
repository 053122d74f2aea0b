"""Reports tell the truth: every linear, every graph, every break, and the bytes."""

import io
import json

import pytest
import rich.console
import torch
from compiling import compile_eager
from torch import nn

import int8compile
from int8compile.errors import CaptureError
from int8compile.report import GraphReport, Reason, Report, Site, WeightUse, folded


class Stack(nn.Module):
    """Three layers and a head, with a graph break before the head if asked for."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.breaks = breaks

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.lm_head(x)


X = torch.randn(4, 16)
SMALL = {"min_features": 0}


def explain(model, *args, **options):
    with torch.no_grad():
        return int8compile.explain(model, *args, options={**SMALL, **options})


def test_explain_names_every_linear():
    report = explain(Stack(), X)
    assert [(s.path, s.in_features, s.out_features, s.reason.name) for s in report.sites] == [
        ("layers.0.0", 16, 16, "REWRITTEN"),
        ("layers.1.0", 16, 16, "REWRITTEN"),
        ("layers.2.0", 16, 16, "REWRITTEN"),
        ("lm_head", 16, 32, "OUTPUT_EMBEDDING"),
    ]
    assert report.summary() == "3 of 4 linears, 1 left in float (OUTPUT_EMBEDDING lm_head)"
    assert (len(report.graphs), report.breaks, len(report.providers)) == (1, [], 1)


def test_weight_memory():
    report = explain(Stack(), X)
    floats, biases, head = 3 * 16 * 16 * 4, 3 * 16 * 4, 32 * 16 * 4
    assert report.weight_bytes_before == floats + biases + head
    assert report.weight_bytes_after == 3 * (16 * 16 + 4 * 16) + biases + head


def test_explain_is_truthful_about_graph_breaks():
    report = explain(Stack(breaks=True), X)
    assert len(report.graphs) == 2
    (graph_break,) = report.breaks
    assert "test_report.py" in graph_break.location
    assert "in forward" in graph_break.location
    assert report.summary() == "3 of 4 linears, 1 left in float (OUTPUT_EMBEDDING lm_head)"
    assert "break at" in str(report)


def test_explain_neither_compiles_nor_changes_nor_disturbs():
    model = Stack()
    compiled = compile_eager(model)
    with torch.no_grad():
        want = compiled(X)
        before = int8compile.last_report()
        for _ in range(12):  # more than Dynamo's recompile limit
            explain(model, X)
        explain(torch.compile(model, backend="eager"), X)
        assert torch.equal(compiled(X), want)
    assert len(compiled.graphs) == 1
    assert int8compile.last_report() is before


def test_explain_counts_gradients_as_compiling_does():
    report = int8compile.explain(Stack(), X, options=SMALL)
    assert {s.reason for s in report.sites} == {Reason.TRAINABLE, Reason.OUTPUT_EMBEDDING}
    assert report.commonest_refusal() is Reason.TRAINABLE


def test_explain_takes_keyword_arguments_and_functions():
    assert explain(lambda x: Stack()(x), X).rewritten == 3
    with torch.no_grad():
        assert int8compile.explain(Stack(), x=X, options=SMALL).rewritten == 3
    with pytest.raises(CaptureError, match="model is int, expected a module or function"):
        int8compile.explain(3)


def test_disabled_passes_are_reported():
    for names in (["quantize"], ["normalize"], ["normalize", "quantize"]):
        report = explain(Stack(), X, disable_passes=names)
        assert [s.reason for s in report.sites] == [Reason.DISABLED] * 4
    merged = explain(Stack(), X, disable_passes=["share", "merge", "verify"])
    assert merged.rewritten == 3
    passes = {"expand", "group_heads", "attend", "fold_queries", "normalize", "quantize", "experts"}
    assert set(merged.graphs[0].pass_counts) == passes


def test_last_report_is_that_of_the_latest_model_with_all_its_graphs():
    broken, whole = Stack(breaks=True), Stack()
    with torch.no_grad():
        compile_eager(whole)(X)
        compile_eager(broken)(X)
    report = int8compile.last_report()
    assert (len(report.graphs), len(report.breaks), len(report.sites)) == (2, 1, 4)
    with torch.no_grad():
        compiled = compile_eager(whole)
        compiled(X)
        first = int8compile.last_report()
        assert (len(first.graphs), len(first.sites), first.recompiles) == (1, 4, 0)
        compiled(torch.randn(7, 16))  # a recompile: the same frame, not one graph more
    assert int8compile.last_report() is first
    assert (len(first.graphs), len(first.sites), first.recompiles) == (1, 4, 1)


def test_table_folds_like_layers():
    sites = [Site(f"model.layers.{i}.fc", 16, 32, "float32", Reason.REWRITTEN) for i in range(30)]
    sites += [Site("lm_head", 16, 99, "float32", Reason.SKIPPED, "lm_head"), Site("0", 1, 2, "float32", Reason.DTYPE)]
    rows = folded(sites)
    assert [(site.path, count) for site, count in rows.items()] == [
        ("model.layers.*.fc", 30),
        ("lm_head", 1),
        ("*", 1),
    ]
    text = str(Report([GraphReport("0/0", "reference (cpu)", sites)]))
    assert "model.layers.*.fc" in text
    assert "float: SKIPPED lm_head" in text
    assert "30 of 32 linears" in text
    assert Reason.SKIPPED.value in text


def test_json_round_trips():
    report = explain(Stack(breaks=True), X)
    data = json.loads(report.to_json())
    assert data["rewritten"] == 3
    assert data["graphs"] == 2
    assert data["sites"][-1]["reason"] == "OUTPUT_EMBEDDING"
    assert data["breaks"][0]["location"] == report.breaks[0].location
    assert data["weight_bytes_after"] == report.weight_bytes_after


def test_a_weight_in_two_graphs_counts_once():
    use = WeightUse(key=1, float_bytes=100, int8_bytes=25, reads_float=False)
    other = WeightUse(key=1, float_bytes=100, int8_bytes=0, reads_float=True)
    report = Report([GraphReport("0/0", "r", weights=[use]), GraphReport("1/0", "r", weights=[use, other])])
    assert (report.weight_bytes_before, report.weight_bytes_after) == (100, 125)


def test_skip_patterns_that_name_nothing_are_told(caplog):
    for breaks in (False, True):
        report = explain(Stack(breaks), X, llm_int8_skip_modules=["layers.1", "layer.2", "zzz"])
        assert report.unmatched == ["layer.2", "zzz"]
        assert "name no linear: layer.2, zzz" in str(report)
    with torch.no_grad():
        compile_eager(Stack(), llm_int8_skip_modules=["zzz"])(X)
    assert "llm_int8_weight_only_modules that name no linear: zzz" in caplog.text


def shown(report: Report, width: int, **options) -> list[str]:
    """The lines of the table, and of what is said above it."""
    text = io.StringIO()
    rich.console.Console(file=text, width=width, color_system=None, **options).print(report)
    lines = text.getvalue().split("\n")
    return lines[: next(i for i, line in enumerate(lines) if "linears" in line)]


def report_of(*paths: str, reason: Reason = Reason.REWRITTEN) -> Report:
    sites = [Site(path, 576, 1536, "bfloat16", reason) for path in paths]
    head = Site("lm_head", 576, 49152, "bfloat16", Reason.OUTPUT_EMBEDDING)
    return Report([GraphReport("0/0", "reference (cpu)", [*sites, head])])


LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]


@pytest.mark.parametrize("soft_wrap", [False, True])
@pytest.mark.parametrize("width", [80, 100, 120])
def test_names_are_whole_in_terminals_of_all_widths(width, soft_wrap):
    report = report_of(*LLAMA)
    lines = shown(report, width, soft_wrap=soft_wrap)
    assert max(map(len, lines)) <= width
    dots = "…" if width == 80 else "model.layers.*."
    assert (lines[0].strip() == "… stands for model.layers.*.") == (width == 80)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert sum(f" {dots}{name} " in line for line in lines) == 1
    assert any(" lm_head " in line and line.endswith(" float: OUTPUT_EMBEDDING ") for line in lines)
    assert report.to_dict()["sites"][0]["path"] == "model.layers.0.self_attn.q_proj"


def test_longer_names_are_cut_after_dots_and_only_those_of_one_word_elsewhere():
    path = "model.vision_tower.encoder_of_pictures.layers.3.self_attention.output_projection_of_heads"
    lines = shown(report_of(*LLAMA, path), 80)
    assert max(map(len, lines)) <= 80
    first = next(i for i, line in enumerate(lines) if "vision_tower" in line)
    names = [line.split()[0] for line in lines[first:] if line[1:2].strip()]
    assert names[-1] == "lm_head"
    assert "".join(names[:-1]) == path.replace(".3.", ".*.")
    assert all(name.endswith(".") for name in names[:-2])
    word = "x" * 300
    lines = shown(report_of(*LLAMA, word, reason=Reason.SKIPPED), 80)
    assert max(map(len, lines)) <= 80
    assert sum(line.count("x") for line in lines) == len(word) + 7  # of "576 x 1536" and the like, and of "K x N"


def test_what_stands_for_a_prefix_can_be_written_in_ascii():
    class Ascii(io.StringIO):
        encoding = "ascii"

    text = Ascii()
    rich.console.Console(file=text, width=80, color_system=None).print(report_of(*LLAMA))
    assert text.getvalue().startswith("... stands for model.layers.*.")
    assert text.getvalue().isascii()
