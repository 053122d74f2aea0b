"""Experts in models that quantize_ makes int8: in float, said so, and in int8 where the backend compiles them."""

import torch
from compiling import compile_eager
from model_zoo import ZOO, output

import int8compile
from int8compile.report import Reason

ENTRIES = {entry.name: entry for entry in ZOO}


def experts_of(report):
    return {site.path: (site.size, site.reason) for site in report.sites if site.experts}


def test_quantize_leaves_experts_and_says_so():
    model, _ = ENTRIES["Mixtral"].make()
    report = int8compile.quantize_(model, {"min_features": 0})
    path = "model.layers.{}.mlp.experts.{}"
    assert experts_of(report) == {
        path.format(layer, name): (size, Reason.EXPERTS)
        for layer in (0, 1)
        for name, size in (("gate_up_proj", "4 x 32 x 128"), ("down_proj", "4 x 64 x 32"))
    }
    assert report.rewritten == 8
    float_bytes = sum(p.numel() * 4 for name, p in model.named_parameters() if "experts" in name)
    assert report.weight_bytes_after > float_bytes > 0


def test_weights_that_are_stored_transposed():
    model, _ = ENTRIES["gpt-oss"].make()
    sizes = {size for size, _ in experts_of(int8compile.quantize_(model, {"min_features": 0})).values()}
    assert sizes == {"4 x 32 x 128", "4 x 64 x 32"}


def test_skipped_experts_are_named_by_their_pattern():
    model, _ = ENTRIES["Mixtral"].make()
    report = int8compile.quantize_(model, {"min_features": 0, "llm_int8_skip_modules": ["experts"]})
    assert {reason for _, reason in experts_of(report).values()} == {Reason.SKIPPED}
    assert not report.unmatched


def test_convolutions_are_no_experts():
    report = int8compile.quantize_(
        torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3), torch.nn.Linear(8, 8)), {"min_features": 0}
    )
    assert [site.path for site in report.sites] == ["1"]


def test_the_backend_takes_what_quantize_left():
    model, inputs = ENTRIES["Mixtral"].make()
    int8compile.quantize_(model, {"min_features": 0})
    with torch.no_grad():
        out = output(compile_eager(model)(**inputs))
        whole = output(compile_eager(ENTRIES["Mixtral"].make()[0])(**inputs))
    report = int8compile.last_report()
    assert report.rewritten == 12
    torch.testing.assert_close(out, whole, rtol=1e-3, atol=1e-3)
