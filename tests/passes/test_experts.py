"""experts: grouped and gathered products become grouped_linear; what else multiplies by experts is said to be float."""

import pytest
import torch
from compiling import compile_eager
from gold import relative_error
from tracing import golden, rewrite

import int8compile
from int8compile.config import Int8Config
from int8compile.ops import grouped_linear
from int8compile.report import Reason
from int8compile.weights.int8_weight import FloatWeight, Int8Weight
from int8compile.weights.store import WeightStore

E, N, K = 4, 24, 16
X = torch.randn(6, K, generator=torch.Generator().manual_seed(0)).bfloat16()  # all that _grouped_mm compiles
OFFSETS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
IDS = torch.tensor([2, 0, 3, 2, 0, 3])


class Experts(torch.nn.Module):
    """Weights [E, N, K], or [E, K, N] if ``transposed``, in the product that ``form`` computes."""

    def __init__(self, form, transposed=False, dtype=torch.bfloat16) -> None:
        super().__init__()
        shape = (E, K, N) if transposed else (E, N, K)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 4
        self.w = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        self.form = form

    def forward(self, x, where):
        return self.form(self.w, x, where)


def grouped(w, x, ends):
    return torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)


def grouped_stored(w, x, ends):
    return torch.nn.functional.grouped_mm(x, w, offs=ends)


def gathered(w, x, ids):
    return torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1)


def gathered_stored(w, x, ids):
    return torch.bmm(x.unsqueeze(1), w[ids]).squeeze(1)


def swapped_after(w, x, ids):
    return torch.matmul(x[:, None], torch.index_select(w, 0, ids).mT)[:, 0]


def by_sign(w, x, ids):
    return (x[:, None] @ w[ids].mT)[:, 0]


FORMS = [
    (grouped, False, OFFSETS),
    (grouped_stored, True, OFFSETS),
    (gathered, False, IDS),
    (gathered_stored, True, IDS),
    (swapped_after, False, IDS),
    (by_sign, False, IDS),
]


def expected(module, ids, transposed, x=X):
    """Each row's expert as a linear of that expert's rows."""
    weight, scale = Int8Weight.quantize(module.w, transposed)
    ids = (
        ids
        if ids.dtype is torch.int64
        else torch.repeat_interleave(torch.arange(E), OFFSETS.diff(prepend=OFFSETS[:0].new_zeros(1)))
    )
    out = x.new_empty((len(x), N))
    for expert in range(E):
        mine = ids == expert
        out[mine] = torch.ops.int8compile.linear(x[mine], weight[expert], scale[expert], None, 6.0, "column")
    return out


@pytest.mark.parametrize(
    ("form", "transposed", "where", "dtype"),
    [(*form, torch.bfloat16) for form in FORMS] + [(*form, torch.float32) for form in FORMS[2:]],
)
def test_a_form_is_rewritten_and_computes_linears_of_each_experts_rows(form, transposed, where, dtype):
    module, x = Experts(form, transposed, dtype), X.to(dtype, copy=True)
    x[3, 5] = 9.0
    compiled = compile_eager(module)
    with torch.no_grad():
        out = compiled(x, where)
    assert torch.equal(out, expected(module, where, transposed, x))
    assert relative_error(out, module(x, where)) < 0.03
    (graph,) = compiled.graphs
    assert len(graph.graph.find_nodes(op="call_function", target=grouped_linear)) == 1
    assert not any(value.dim() == 3 and value.dtype == dtype and value.shape[0] == E for value in inputs_of(graph))
    (site,) = int8compile.last_report().sites
    assert (site.path, site.size, site.reason) == ("w", f"{E} x {K} x {N}", Reason.REWRITTEN)


def inputs_of(gm):
    return [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]


def test_the_graph():
    assert golden(Experts(grouped), X, OFFSETS) == (
        "%0 = input : bf16[6, 16]\n"
        "%1 = input : i32[4]\n"
        '%2 = int8 "w" : i8[4, 24, 16]\n'
        '%3 = scale "w" : f32[4, 24]\n'
        "%4 = int8compile.grouped_linear(%0, %2, %3, %1, None, 6, 'column') : bf16[6, 24]\n"
        "return %4\n"
    )


def test_the_graph_of_gathered_experts():
    assert golden(Experts(gathered_stored, transposed=True), X, IDS) == (
        "%0 = input : bf16[6, 16]\n"
        "%1 = input : i64[6]\n"
        '%2 = int8 "w" : i8[4, 24, 16]\n'
        '%3 = scale "w" : f32[4, 24]\n'
        "%4 = %0.unsqueeze(1) : bf16[6, 1, 16]\n"
        "%5 = aten.arange(4, device=cpu, dtype=i64) : i64[4]\n"
        "%6 = aten.index.Tensor(%5, [%1]) : i64[6]\n"
        "%7 = aten.sort(%6) : (i64[6], i64[6])\n"
        "%8 = operator.getitem(%7, 0) : i64[6]\n"
        "%9 = operator.getitem(%7, 1) : i64[6]\n"
        "%10 = aten.searchsorted.Tensor(%8, %5, out_int32=True, right=True) : i32[4]\n"
        "%11 = aten.argsort(%9) : i64[6]\n"
        "%12 = aten.squeeze.dim(%4, 1) : bf16[6, 16]\n"
        "%13 = aten.index.Tensor(%12, [%9]) : bf16[6, 16]\n"
        "%14 = int8compile.grouped_linear(%13, %2, %3, %10, None, 6, 'column') : bf16[6, 24]\n"
        "%15 = aten.index.Tensor(%14, [%11]) : bf16[6, 24]\n"
        "%16 = aten.unsqueeze(%15, 1) : bf16[6, 1, 24]\n"
        "%17 = %16.squeeze(1) : bf16[6, 24]\n"
        "return %17\n"
    )


def untouched(module, *args, **options):
    capture, context = rewrite(module, *args, **options)
    assert not capture.lifted
    assert not capture.graph.find_nodes(op="call_function", target=grouped_linear)
    return [(site.reason, site.detail) for site in context.sites.values()]


def test_what_has_another_form_stays_float_and_says_so():
    for product in (lambda w, x, _: torch.matmul(x, w), lambda w, x, _: torch.matmul(w.mT, x.mT)):
        assert untouched(Experts(product, transposed=True), X, IDS) == [(Reason.EXPERTS, "all experts at once")]
    einsum = Experts(lambda w, x, _: torch.einsum("sk,enk->esn", x, w))
    assert untouched(einsum, X, IDS) == [(Reason.EXPERTS, "einsum")]
    rows = Experts(lambda w, x, ids: torch.bmm(x, w[ids]), transposed=True)
    assert untouched(rows, torch.randn(6, 3, K).bfloat16(), IDS) == [(Reason.EXPERTS, "several rows of an expert")]
    broadcast = Experts(lambda w, x, ids: torch.matmul(x, w[ids]), transposed=True)
    assert untouched(broadcast, torch.randn(1, 1, K).bfloat16(), IDS) == [(Reason.EXPERTS, "rows that are broadcast")]
    batches = Experts(lambda w, x, _: torch._grouped_mm(x, w), transposed=True)
    assert untouched(batches, torch.randn(E, 8, K).bfloat16(), IDS) == [(Reason.EXPERTS, "not rows by offsets")]
    assert untouched(Experts(grouped), X, OFFSETS, llm_int8_has_fp16_weight=True)[0][0] is Reason.EXPERTS


def test_the_rules_of_linears_hold():
    assert untouched(Experts(grouped), X, OFFSETS, min_features=17) == [(Reason.TOO_SMALL, "min_features=17")]
    assert untouched(Experts(grouped), X, OFFSETS, llm_int8_skip_modules=["w"]) == [(Reason.SKIPPED, "w")]
    trained = Experts(gathered)
    trained.w.requires_grad_()
    assert untouched(trained, X, IDS, grad=True)[0][0] is Reason.TRAINABLE
    written = Experts(lambda w, x, ids: (w.mul_(2), gathered(w, x, ids))[1])
    assert untouched(written, X, IDS)[0][0] is Reason.MUTATED
    unread = Experts(lambda w, x, ids: (torch.bmm(w[ids], x.unsqueeze(-1)), x)[1])
    assert untouched(unread, X, IDS)[0][0] is Reason.UNREAD
    computed = Experts(lambda w, x, ids: gathered(w * 2, x, ids))
    assert untouched(computed, X, IDS) == []


def test_autocast_that_changes_the_dtype_stays_float():
    def form(w, x, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return gathered(w, x, ids)

    report = int8compile.explain(Experts(form, dtype=torch.float32), X.float(), IDS, options={"min_features": 0})
    assert [(site.reason, site.detail) for site in report.sites] == [(Reason.EXPERTS, "float32 to bfloat16")]


def test_a_weight_that_only_looks_like_experts_is_left_alone():
    attention = Experts(lambda w, x, _: torch.bmm(x, x.mT))
    assert untouched(attention, torch.randn(2, 5, K), IDS) == []
    single = Experts(lambda w, x, _: torch.matmul(x, w[:1].mT))
    assert untouched(single, X, IDS) == []


def test_indices_count_from_the_end_and_out_of_range_they_are_refused():
    module = Experts(gathered)
    compiled = compile_eager(module)
    with torch.no_grad():
        assert torch.equal(compiled(X, IDS - E), compiled(X, IDS))
        with pytest.raises((IndexError, RuntimeError)):
            compiled(X, IDS + 1)


def test_ids_on_another_device_stay_float():
    with torch.device("meta"):
        module = Experts(gathered)
        x = torch.empty_like(X, device="meta")
    assert untouched(module, x, IDS) == [(Reason.EXPERTS, "ids on another device")]


def gathered_and_written(w, x, ids):
    selected = w[ids]
    selected.mul_(2)
    return torch.bmm(selected, x.unsqueeze(-1)).squeeze(-1)


def a_view_written(w, x, ids):
    turned = torch.index_select(w, 0, ids).mT
    turned[0].zero_()
    return torch.bmm(x.unsqueeze(1), turned).squeeze(1)


@pytest.mark.parametrize("form", [gathered_and_written, a_view_written])
def test_gathered_weights_that_are_written_to_are_multiplied_as_they_are(form):
    module = Experts(form)
    with torch.no_grad():
        assert torch.equal(compile_eager(module)(X, IDS), module(X, IDS))
    assert [(s.reason, s.detail) for s in int8compile.last_report().sites] == [(Reason.MUTATED, "after gathering")]


def test_gathered_weights_may_be_written_to_after_the_product():
    def form(w, x, ids):
        selected = w[ids]
        out = torch.bmm(selected, x.unsqueeze(-1)).squeeze(-1)
        return out, selected.zero_()

    module = Experts(form)
    with torch.no_grad():
        out, zeros = compile_eager(module)(X, IDS)
    assert torch.equal(out, expected(module, IDS, False))
    assert zeros.shape == (len(IDS), N, K)
    assert zeros.eq(0).all()


@pytest.mark.parametrize("rows_first", [False, True])
def test_one_gathered_expert_for_all_rows_stays_float(rows_first):
    def form(w, x, ids):
        return (x[:, None] @ w[ids].mT)[:, 0] if rows_first else torch.matmul(w[ids], x.unsqueeze(-1)).squeeze(-1)

    module = Experts(form)
    with torch.no_grad():
        assert torch.equal(compile_eager(module)(X, IDS[:1]), module(X, IDS[:1]))
    (site,) = int8compile.last_report().sites
    assert (site.reason, site.detail) == (Reason.EXPERTS, "rows that are broadcast")


def test_indices_are_read_where_the_weights_are_gathered():
    def form(w, x, ids):
        ids = ids.clone()
        selected = w[ids]
        ids.zero_()
        return torch.bmm(selected, x.unsqueeze(-1)).squeeze(-1) + ids.sum()

    module = Experts(form)
    with torch.no_grad():
        assert torch.equal(compile_eager(module)(X, IDS), expected(module, IDS, False))


@pytest.mark.parametrize(("transposed", "rows"), [(True, 1), (True, 5), (False, 3), (False, 0)])
def test_rows_for_every_expert(transposed, rows):
    module = Experts(lambda w, x, _: torch.bmm(x, w if transposed else w.mT), transposed)
    x = torch.randn(E, rows, K).bfloat16()
    weight, scale = Int8Weight.quantize(module.w, transposed)
    with torch.no_grad():
        out = compile_eager(module)(x, IDS)
        torch._dynamo.mark_dynamic(x, 1) if rows > 1 else None
        grown = compile_eager(module)(x, IDS)
    assert out.shape == (E, rows, N)
    for expert in range(E):
        want = torch.ops.int8compile.linear(x[expert], weight[expert], scale[expert], None, 6.0, "column")
        assert torch.equal(out[expert], want)
        assert torch.equal(grown[expert], want)
    assert int8compile.last_report().rewritten == 1


def test_results_may_be_written_to():
    def form(w, x, ends):
        out = grouped(w, x, ends)
        out.add_(1.0)
        return out

    module = Experts(form)
    with torch.no_grad():
        assert torch.equal(compile_eager(module)(X, OFFSETS), expected(module, OFFSETS, False) + 1)


def test_rows_of_no_expert_are_zero_and_offsets_may_be_64_bits_wide():
    module = Experts(grouped)
    with torch.no_grad():
        out = compile_eager(module)(X, torch.tensor([1, 1, 3, 4], dtype=torch.int32))
    assert out[4:].eq(0).all()
    pytest.importorskip("transformers.integrations.moe")
    fallback = Experts(lambda w, x, ends: torch.ops.transformers.grouped_mm_fallback(x, w.mT, ends))
    with torch.no_grad():
        out = compile_eager(fallback)(X, OFFSETS.long())
    assert torch.equal(out, expected(fallback, OFFSETS, False, X))
    assert int8compile.last_report().rewritten == 1


def test_changed_weights_are_seen():
    module = Experts(grouped)
    compiled = compile_eager(module)
    with torch.no_grad():
        compiled(X, OFFSETS)
        module.w.mul_(torch.linspace(-1, 2, N)[:, None])
        assert torch.equal(compiled(X, OFFSETS), expected(module, OFFSETS, False))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2)])
def test_writes_that_pytorch_does_not_count_are_seen_in_whatever_order_the_weight_lies(order):
    module = Experts(gathered)
    back = [order.index(i) for i in range(3)]
    module.w = torch.nn.Parameter(module.w.permute(order).contiguous().permute(back), requires_grad=False)
    compiled = compile_eager(module)
    with torch.no_grad():
        compiled(X, IDS)
        module.w.data.mul_(-2)
        assert torch.equal(compiled(X, IDS), expected(Experts(gathered), IDS, False) * -2)


@pytest.mark.parametrize("transposed", [False, True])
def test_released_weights_come_back(transposed):
    module = Experts(grouped_stored if transposed else grouped, transposed)
    before = module.w.detach().clone()
    compiled = compile_eager(module, release_weights=True)
    with torch.no_grad():
        out = compiled(X, OFFSETS)
        with pytest.raises(RuntimeError, match="freed by release_weights"):
            module.w.sum()
        assert torch.equal(compiled(X, OFFSETS), out)
    int8compile.restore_weights_(module)
    torch.testing.assert_close(module.w, before, rtol=0.01, atol=0.02)


def test_weights_that_are_read_in_both_orders_are_released_after_both():
    module = Experts(lambda w, x, ids: gathered_stored(w, gathered(w, x, ids), ids).relu() - gathered(w, x, ids))
    module.w = torch.nn.Parameter(torch.randn(E, K, K).bfloat16() / 4, requires_grad=False)
    with torch.no_grad():
        want = compile_eager(module)(X, IDS)
        compiled = compile_eager(module, release_weights=True)
        int8compile.invalidate(module)
        assert torch.equal(compiled(X, IDS), want)
        with pytest.raises(RuntimeError, match="freed by release_weights"):
            module.w.sum()
        assert torch.equal(compiled(X, IDS), want)
    int8compile.restore_weights_(module)
    with torch.no_grad():
        assert relative_error(module(X, IDS), want) < 0.03
        assert relative_error(compiled(X, IDS), want) < 0.03


def test_gradients_reach_the_activation():
    module, x = Experts(grouped), X.clone().requires_grad_()
    compile_eager(module)(x, OFFSETS).sum().backward()
    weight, scale = Int8Weight.quantize(module.w)
    each = (weight.float() * scale.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(x.grad.float(), each[[0, 0, 2, 2, 2, 3]], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_inductor(kernels):
    module = Experts(lambda w, x, where: gathered(w, x, where[0]) + grouped(w, x, where[1]))
    compiled = torch.compile(module, backend="int8", options={"min_features": 0, "kernels": kernels}, fullgraph=True)
    with torch.no_grad():
        out = compiled(X, (IDS, OFFSETS))
    want = expected(module, IDS, False) + expected(module, OFFSETS, False)
    torch.testing.assert_close(out, want, rtol=0.01, atol=0.02)
    assert int8compile.last_report().rewritten == 2


class Routed(torch.nn.Module):
    """A router, and experts that it chooses among by sorting; the same linear without its topk is no router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.other = (torch.nn.Linear(K, E, dtype=torch.bfloat16) for _ in range(2))
        self.experts = Experts(grouped)

    def forward(self, x):
        scores, ids = self.gate(x).softmax(-1).topk(1)
        ids, order = ids.reshape(-1).sort()
        ends = torch.histc(ids.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
        return self.experts(x[order], ends) * scores, self.other(x)


def test_routers_stay_float():
    report = int8compile.explain(Routed().requires_grad_(False), X, options={"min_features": 0})
    assert {site.path: site.reason.name for site in report.sites} == {
        "gate": "ROUTER",
        "experts.w": "REWRITTEN",
        "other": "REWRITTEN",
    }
    assert f"{E} x {K} x {N}" in str(report)


def test_a_disabled_pass_is_said():
    report = int8compile.explain(
        Experts(grouped), X, OFFSETS, options={"min_features": 0, "disable_passes": ["experts"]}
    )
    assert [(site.size, site.reason) for site in report.sites] == [(f"{E} x {K} x {N}", Reason.DISABLED)]


def test_bytes_of_experts_are_counted():
    report = int8compile.explain(Experts(grouped), X, OFFSETS, options=Int8Config(min_features=0))
    assert (report.weight_bytes_before, report.weight_bytes_after) == (2 * E * N * K, E * N * K + 4 * E * N)


@pytest.mark.parametrize("options", [{"activation": "float"}, {"llm_int8_weight_only_modules": ["w"]}])
def test_weights_only(options):
    module = Experts(grouped)
    with torch.no_grad():
        out = compile_eager(module, **options)(X, OFFSETS)
    weight, scale = Int8Weight.quantize(module.w)
    want = torch.ops.int8compile.linear(X[2:5], weight[2], scale[2], None, 0.0, "all")
    assert torch.equal(out[2:5], want)
    (site,) = int8compile.last_report().sites
    assert (site.reason, site.detail) == (Reason.REWRITTEN, "weights only")


def test_the_store_keeps_experts_in_both_orders():
    weight = torch.randn(3, 5, 7)
    store = WeightStore()
    int8weights = [store.resolve([FloatWeight(weight, t)]) for t in (False, True)]
    for (codes, scale), stored in zip(int8weights, (weight, weight.mT), strict=True):
        assert codes.shape == stored.shape
        assert scale.shape == stored.shape[:2]
        torch.testing.assert_close(scale, stored.abs().amax(2) / 127)
    torch.testing.assert_close(int8weights[1].dequantize(torch.float32, True), weight, rtol=0, atol=0.02)
