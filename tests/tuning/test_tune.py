"""What is measured for, in which time, and what becomes of it; with made-up times, or the shortest there are."""

import dataclasses
import functools
import importlib
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import int8compile
from int8compile.errors import OptionValueError
from int8compile.native import loader, tuned
from int8compile.passes import fold_queries
from int8compile.passes.fold_queries import choice_keys
from int8compile.tuning import attention, products, prompts, request, tune
from int8compile.tuning.measure import Case
from int8compile.tuning.request import Request

attend_pass = importlib.import_module("int8compile.passes.attend")
native = torch.ops.int8compile_native
RUN = tune.run


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty folder for the table of a test; the kernels, which are loaded, forget it afterwards."""
    loader.load("cpu")
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("INT8COMPILE_IGNORE_TUNED")
    tuned.forget()
    yield tmp_path / "cache"
    monkeypatch.setenv("INT8COMPILE_IGNORE_TUNED", "1")
    tuned.forget()
    tuned.apply_to_kernels()


def made_up(*entries):
    """Cases of a clock of their own: (where, default, seconds of each form)."""
    now = [0.0]

    def forms(seconds):
        def pass_time(by):
            now[0] += by

        return {name: lambda count, s=s: pass_time(s * count) for name, s in seconds.items()}

    cases = [
        Case(tunable, tuned.where_of(**where), f"case {i}", default, lambda s=seconds: forms(s))
        for i, (tunable, where, default, seconds) in enumerate(entries)
    ]
    return cases, lambda: now[0]


def run(entries, seconds=1e9):
    cases, clock = made_up(*entries)
    return tune.run(cases, seconds, lambda *step: None, clock)


def place(rows=16, k=512, cols=1024):
    return {"isa": native.isa(), "rows": rows, "k": k, "cols": cols}


@pytest.fixture
def two_kernels():
    loader.load("cpu")
    if len(native.cpu_kernels().split()) < 2:
        pytest.skip("this CPU's provider has one kernel, so that there is no choice")


def test_shapes_as_text():
    assert request.shapes("576x1536, 2048x2048,576x1536") == ((576, 1536), (2048, 2048))
    for text in (
        "",
        "576",
        "576x",
        "576x0",
        "0x576",
        "-1x5",
        "1.5x2",
        "131073x8",
        "100000x100000",
        "9" * 30 + "x1",
        "2x2;3x3",
    ):
        with pytest.raises(OptionValueError, match="option shapes="):
            request.shapes(text)


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"seconds": 0}, {"seconds": float("nan")}, {"shapes": [(0, 1)]}, {"shapes": [5]}]
)
def test_bad_options_are_named(options):
    with pytest.raises(OptionValueError, match=f"option {next(iter(options))}="):
        int8compile.tune(**options)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, n, bias=False) for n in (256, 128, 128))
        self.out = nn.Linear(256, 512)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_a_models_shapes_are_those_of_its_products_and_attentions():
    model = Layer().to(torch.bfloat16)
    found = request.of_model(model, (torch.randn(1, 5, 256, dtype=torch.bfloat16),), {}, {"min_features": 0})
    assert found == Request(((256, 512),), ((4, 2, 64),), (torch.bfloat16,))  # q, k and v as one, and out


def test_linears_whose_weights_alone_are_int8_have_other_kernels():
    model, options = nn.Linear(256, 512), {"min_features": 0, "activation": "float"}
    found = request.of_model(model.requires_grad_(False), (torch.randn(2, 256),), {}, options)
    assert found.products == ()


def test_a_model_without_linears_asks_for_nothing():
    found = request.of_model(torch.sin, (torch.randn(3),), {}, None)
    assert (found.products, found.attentions) == ((), ())


def test_half_octaves_are_those_of_the_kernels():
    assert [products.half_octave(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 576, 131072)] == [
        1, 2, 3, 4, 4, 6, 6, 8, 8, 12, 12, 16, 512, 131072,
    ]  # fmt: skip


@pytest.mark.usefixtures("two_kernels")
def test_a_choice_holds_for_exactly_the_half_octaves_it_was_kept_for(table):
    other = native.cpu_kernels().split()[-1]
    sizes = [1, 2, 3, 5, 95, 96, 127, 128, 191, 192, 500, 576, 767, 768, 1000, 4096, 131072]
    for size in sizes:
        half = products.half_octave(size)
        native.set_tuned_kernels(f"3 1 {half} {half} {other}")
        default = {n for n in sizes if native.cpu_kernel(1, n, n, 2) == other}
        holds = {n for n in sizes if native.cpu_kernel(1, n, n, 3) == other}
        assert holds - default == {n for n in sizes if products.half_octave(n) == half and n not in default}
    native.set_tuned_kernels("")


@pytest.mark.usefixtures("two_kernels")
def test_cases_of_products_are_right_and_leave_no_kernel_forced():
    x, weight = torch.randn(4, 256), torch.randint(-127, 128, (64, 256), dtype=torch.int8)
    before = native.cpu_kernel(1, 64, 256, 1)
    cases = list(products.cases(Request(products=((256, 64), (100, 40)))))
    assert len(cases) == 2 * len(products.ROWS)
    assert {dict(case.where)["rows"] for case in cases} == set(products.ROWS)
    for case in cases[:2]:
        forms = case.prepare()
        assert case.default in forms
        for form in forms.values():
            form(3)
    products.release()
    assert native.cpu_kernel(1, 64, 256, 1) == before
    torch.ops.int8compile.linear(x, weight, torch.rand(64), None, 6.0, "column")


def test_cases_of_attention_have_the_default_among_their_forms():
    cases = list(attention.cases(Request(attentions=((4, 2, 8), (2, 2, 8)))))
    assert [dict(case.where)["kv_heads"] for case in cases] == [2, 2] * 3
    for case in cases:
        forms = case.prepare()
        assert case.default in forms
        assert len(forms) == 2
        for form in forms.values():
            form(1)


def test_what_there_is_no_time_for_keeps_its_default():
    entries = [("thing", {"size": i}, "a", {"a": 1.0, "b": 0.5}) for i in range(5)]
    found = run(entries, seconds=40.0)
    assert 0 < len(found.decisions) < 5
    assert len(found.decisions) + len(found.left) == 5
    assert all(decision.choice == "b" for decision in found.decisions)


def test_every_step_is_told():
    cases, clock = made_up(*[("thing", {"size": i}, "a", {"a": 1.0, "b": 0.5}) for i in range(3)])
    told = []
    tune.run(cases, 1e9, lambda *step: told.append(step), clock)
    assert told == [("measure", i, 3) for i in range(4)]


@pytest.mark.usefixtures("two_kernels")
def test_choices_are_kept_and_taken(table, monkeypatch):
    first, *_, last = native.cpu_kernels().split()
    default = native.cpu_kernel(16, 1024, 512, 7)
    other = last if default == first else first
    entries = [
        (tuned.PRODUCT, place(), default, {default: 1.0, other: 0.5}),
        ("fold_queries", choice_keys(torch.float32, 6, 2), "folded", {"folded": 1.0, "as it is": 0.8}),
        ("fold_queries", choice_keys(torch.float32, 2, 2), "as it is", {"as it is": 0.8, "two rows": 1.0}),
    ]
    cases, clock = made_up(*entries)
    monkeypatch.setattr(tune, "_cases", lambda request: cases)
    monkeypatch.setattr(tune, "run", lambda *args, real=tune.run: real(*args, clock))
    found = int8compile.tune(threads=7)
    assert found.threads == 7
    assert torch.get_num_threads() != 7
    assert [decision.tunable for decision in found.changes] == ["product", "fold_queries"]
    assert native.cpu_kernel(16, 1024, 512, 7) == other
    assert native.cpu_kernel(16, 1024, 512, 6) == default
    assert tuned.choice("fold_queries", threads=7, **choice_keys(torch.float32, 6, 2)) == "as it is"
    assert tuned.choice("fold_queries", threads=7, **choice_keys(torch.float32, 2, 2)) is None
    written = json.loads(found.path.read_text())
    assert [choice["gain"] for choice in written["choices"]] == [2.0, 1.25]
    assert json.loads(json.dumps(found.to_dict()))["path"] == str(found.path)


def test_a_measurement_that_is_not_kept_changes_nothing(table, monkeypatch):
    cases, clock = made_up(
        ("fold_queries", choice_keys(torch.float32, 6, 2), "folded", {"folded": 1.0, "as it is": 0.1})
    )
    monkeypatch.setattr(tune, "_cases", lambda request: cases)
    monkeypatch.setattr(tune, "run", lambda *args, real=tune.run: real(*args, clock))
    found = int8compile.tune(keep=False)
    assert (len(found.changes), found.path) == (1, None)
    assert not table.exists() or not list(table.glob("tuned-*"))
    assert tuned.choice("fold_queries", threads=found.threads, **choice_keys(torch.float32, 6, 2)) is None


def test_unsteady_times_are_not_kept_and_leave_what_was_kept(table, monkeypatch):
    where = choice_keys(torch.float32, 6, 2)
    made = [("fold_queries", where, "folded", {"folded": 1.0, "as it is": 0.5})]
    for noise in (1.0, 3.0):
        cases, clock = made_up(*made)
        if noise > 1:
            now, turns = [0.0], [0]

            def jitter(count, now=now, turns=turns):
                turns[0] += 1
                now[0] += count * (3.0 if turns[0] % 3 == 0 else 1.0)

            cases = [
                dataclasses.replace(case, prepare=lambda run=jitter: {"folded": run, "as it is": run}) for case in cases
            ]
            clock = lambda now=now: now[0]  # noqa: E731
        monkeypatch.setattr(tune, "_cases", lambda request, cases=cases: cases)
        monkeypatch.setattr(tune, "run", lambda *args, real=RUN, clock=clock: real(*args, clock))
        found = int8compile.tune(threads=7)
        assert found.unsteady == (noise > 1)
        assert (found.path is None) == found.unsteady
        assert tuned.choice("fold_queries", threads=7, **where) == "as it is"


def test_after_a_failure_all_is_as_it_was(table, monkeypatch):
    threads = torch.get_num_threads()
    broken = Case("thing", tuned.where_of(size=1), "broken", "a", lambda: 1 / 0)
    monkeypatch.setattr(tune, "_cases", lambda request: [broken])
    with pytest.raises(ZeroDivisionError):
        int8compile.tune(threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("two_kernels")
def test_a_tuned_product_has_the_same_bits(table):
    x, weight = torch.randn(16, 576), torch.randint(-127, 128, (100, 576), dtype=torch.int8)
    scale, outs = torch.rand(100), []
    for kernel in native.cpu_kernels().split():
        native.set_tuned_kernels(f"{torch.get_num_threads()} 16 512 96 {kernel}")
        assert native.cpu_kernel(16, 100, 576, torch.get_num_threads()) == kernel
        outs.append(torch.ops.int8compile.linear(x, weight, scale, None, 2.0, "column"))
    assert all(torch.equal(outs[0], out) for out in outs)


def test_the_pass_and_its_tunable_speak_of_the_same():
    assert fold_queries.__name__ == "fold_queries"
    assert attention.TUNABLE == "fold_queries"


@pytest.mark.parametrize("choice", ["native", "torch"])
def test_a_tuned_table_says_who_attends(table, monkeypatch, choice):
    q, k, v = (torch.randn(1, heads, 40, 16) for heads in (4, 2, 2))

    def attend(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    where = attend_pass.choice_keys(torch.float32, "masked", 4, 2, 16)
    asked = {("attend", torch.get_num_threads(), tuned.where_of(**where)): choice}
    monkeypatch.setattr(tuned, "_by_key", functools.cache(lambda: asked))
    with torch.no_grad():
        assert int8compile.explain(attend, q, k, v).attentions == (choice == "native")


def test_attention_of_prompts_is_measured_in_both_forms(table):
    wanted = Request(attentions=((4, 2, 16),), dtypes=(torch.float32, torch.bfloat16))
    cases = list(prompts.cases(wanted))
    assert [case.tunable for case in cases] == ["attend"] * 4
    with torch.no_grad():
        for case in cases:
            runs = case.prepare()
            assert set(runs) == {"native", "torch"}
            assert case.default in runs
            for form in runs.values():
                form(1)
