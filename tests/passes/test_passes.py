"""Golden graphs of each pass, with what it must leave untouched. EXPECTTEST_ACCEPT=1 rewrites the goldens."""

import operator

import torch
from expecttest import TestCase
from torch import nn
from torch.nn import functional as F
from tracing import golden, rewrite

from int8compile.graph.dump import dump
from int8compile.ops import linear, quantize_rowwise, scaled_mm
from int8compile.report import Reason


class OneWeight(nn.Module):
    """Applies a function to x and a weight."""

    def __init__(self, function, *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(*shape), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(bias), requires_grad=False) if bias else None

    def forward(self, x):
        return self.function(x, self.weight) if self.bias is None else self.function(x, self.weight, self.bias)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def reasons(module: nn.Module, *args, **kwargs) -> list[str]:
    return [site.reason.name for site in rewrite(module, *args, **kwargs)[1].sites.values()]


class TestNormalize(TestCase):
    """Each form of a linear becomes aten.linear (a)-(e); look-alikes stay."""

    def test_linear(self):
        self.assertExpectedInline(
            golden(frozen(nn.Linear(3, 4)), torch.ones(2, 3), upto="normalize"),
            """\
%0 = input : f32[2, 3]
%1 = weight "weight" : f32[4, 3]
%2 = weight "bias" : f32[4]
%3 = aten.linear(%0, %1, %2) : f32[2, 4]
return %3
""",
        )

    def test_product_with_a_transposed_weight(self):
        forms = (
            lambda x, w: x @ w.t(),
            lambda x, w: torch.matmul(x, w.transpose(0, 1)),
            lambda x, w: x.matmul(w.permute(1, 0)),
            lambda x, w: torch.mm(x, w.T),
            lambda x, w: x.mm(w.t().t().transpose(-1, -2)),
            lambda x, w: torch.matmul(x, w.mT),
            lambda x, w: torch.einsum("bk,nk->bn", x, w),
        )
        (text,) = {golden(OneWeight(form, 4, 3), torch.ones(2, 3), upto="normalize") for form in forms}
        self.assertExpectedInline(
            text,
            """\
%0 = input : f32[2, 3]
%1 = weight "weight" : f32[4, 3]
%2 = aten.linear(%0, %1, None) : f32[2, 4]
return %2
""",
        )

    def test_product_with_a_k_n_weight(self):
        forms = (
            lambda x, w: x @ w,
            lambda x, w: torch.mm(x, w),
            lambda x, w: torch.einsum("bk,kn->bn", x, w),
            lambda x, w: torch.einsum("kn,bk->bn", w, x),
        )
        (text,) = {golden(OneWeight(form, 3, 4), torch.ones(2, 3), upto="normalize") for form in forms}
        self.assertExpectedInline(
            text,
            """\
%0 = input : f32[2, 3]
%1 = weight "weight" : f32[3, 4]
%2 = aten.t(%1) : f32[4, 3]
%3 = aten.linear(%0, %2, None) : f32[2, 4]
return %3
""",
        )

    def test_addmm_is_conv1d(self):
        form = OneWeight(lambda x, w, b: torch.addmm(b, x, w), 3, 4, bias=4)
        self.assertExpectedInline(
            golden(form, torch.ones(2, 3), upto="normalize"),
            """\
%0 = input : f32[2, 3]
%1 = weight "bias" : f32[4]
%2 = weight "weight" : f32[3, 4]
%3 = aten.t(%2) : f32[4, 3]
%4 = aten.linear(%0, %3, %1) : f32[2, 4]
return %4
""",
        )

    def test_einsum_with_many_leading_dimensions(self):
        forms = [lambda x, w, e=e: torch.einsum(e, x, w) for e in ("abk,nk->abn", "...k,nk->...n")]
        (text,) = {golden(OneWeight(form, 4, 3), torch.ones(2, 5, 3), upto="normalize") for form in forms}
        self.assertExpectedInline(
            text,
            """\
%0 = input : f32[2, 5, 3]
%1 = weight "weight" : f32[4, 3]
%2 = aten.linear(%0, %1, None) : f32[2, 5, 4]
return %2
""",
        )

    def test_untouched(self):
        """(1) addmm scaled (2) bias not [N] (3) einsum that permutes its result, or (4) sums a batch dimension
        (5) product of two activations (6) a 3-D weight (7) the weight on the left (8) einsum that broadcasts"""
        cases = [
            OneWeight(lambda x, w, b: torch.addmm(b, x, w, alpha=2), 3, 3, bias=3),
            OneWeight(lambda x, w, b: torch.addmm(b, x, w), 3, 3, bias=1),
            OneWeight(lambda x, w: torch.einsum("bk,nk->nb", x, w), 4, 3),
            OneWeight(lambda x, w: torch.einsum("bk,nk->n", x, w), 4, 3),
            OneWeight(lambda x, w: (x @ x.t()) + w, 3, 3),
            OneWeight(lambda x, w: x @ w, 2, 3, 4),
            OneWeight(lambda x, w: w @ x, 3, 3),
            OneWeight(lambda x, w: torch.einsum("bk,nk->bn", x, w), 4, 1),
            OneWeight(lambda x, w: torch.einsum("kn,...k->...n", w, x[:, :1]), 4, 3),
        ]
        for case in cases:
            before = dump(rewrite(case, torch.ones(3, 3), upto="normalize", disable_passes=["normalize"])[0].graph)
            assert golden(case, torch.ones(3, 3), upto="normalize") == before, before

    def test_numbers_do_not_change(self):
        x, module = torch.randn(2, 3), OneWeight(lambda x, w, b: torch.addmm(b, x, w), 3, 4, bias=4)
        captured, _ = rewrite(module, x, upto="normalize")
        names = [n.meta.get("int8compile_constant") for n in captured.kept]
        inputs = [x if name is None else module.get_parameter(name) for name in names]
        torch.testing.assert_close(captured.gm(*inputs), module(x), rtol=0, atol=0)


class TestQuantize(TestCase):
    def test_linear_with_bias(self):
        self.assertExpectedInline(
            golden(frozen(nn.Linear(3, 4)), torch.ones(2, 3), upto="quantize"),
            """\
%0 = input : f32[2, 3]
%1 = weight "bias" : f32[4]
%2 = int8 "weight" : i8[4, 3]
%3 = scale "weight" : f32[4]
%4 = int8compile.linear(%0, %2, %3, %1, 6, 'column') : f32[2, 4]
return %4
""",
        )

    def test_k_n_weight_is_stored_n_k(self):
        form = OneWeight(lambda x, w: x @ w, 3, 4)
        self.assertExpectedInline(
            golden(form, torch.ones(2, 3), upto="quantize"),
            """\
%0 = input : f32[2, 3]
%1 = int8 "weight" : i8[4, 3]
%2 = scale "weight" : f32[4]
%3 = int8compile.linear(%0, %1, %2, None, 6, 'column') : f32[2, 4]
return %3
""",
        )

    def test_dynamic_batch_and_options(self):
        module, x = frozen(nn.Linear(3, 4, bias=False)).bfloat16(), torch.ones(2, 3, dtype=torch.bfloat16)
        text = golden(module, x, upto="quantize", dynamic=True, llm_int8_threshold=3, outlier_policy="element")
        self.assertExpectedInline(
            text,
            """\
%0 = input : bf16[s0, 3]
%1 = int8 "weight" : i8[4, 3]
%2 = scale "weight" : f32[4]
%3 = int8compile.linear(%0, %1, %2, None, 3, 'element') : bf16[s0, 4]
return %3
""",
        )

    def test_weight_that_something_else_reads_too_stays_an_input(self):
        form = OneWeight(lambda x, w: F.linear(x, w) + w.sum(), 4, 3)
        self.assertExpectedInline(
            golden(form, torch.ones(2, 3), upto="quantize"),
            """\
%0 = input : f32[2, 3]
%1 = weight "weight" : f32[4, 3]
%2 = int8 "weight" : i8[4, 3]
%3 = scale "weight" : f32[4]
%4 = int8compile.linear(%0, %2, %3, None, 6, 'column') : f32[2, 4]
%5 = %1.sum() : f32[]
%6 = operator.add(%4, %5) : f32[2, 4]
return %6
""",
        )

    def test_one_weight_read_twice_is_lifted_once(self):
        form = OneWeight(lambda x, w: F.linear(F.linear(x, w), w), 3, 3)
        self.assertExpectedInline(
            golden(form, torch.ones(2, 3), upto="quantize"),
            """\
%0 = input : f32[2, 3]
%1 = int8 "weight" : i8[3, 3]
%2 = scale "weight" : f32[3]
%3 = int8compile.linear(%0, %1, %2, None, 6, 'column') : f32[2, 3]
%4 = int8compile.linear(%3, %1, %2, None, 6, 'column') : f32[2, 3]
return %4
""",
        )

    def test_refusals_leave_the_float_node(self):
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        text = golden(module, torch.ones(2, 3), upto="quantize", grad=True)
        assert text == golden(module, torch.ones(2, 3), upto="normalize")
        assert "int8" not in text

    def test_reasons(self):
        x = torch.ones(2, 3)
        ones = nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 200))
        assert reasons(frozen(ones), x, min_features=4) == ["TOO_SMALL", "REWRITTEN"]
        assert reasons(frozen(ones), x, llm_int8_skip_modules=["1"]) == ["REWRITTEN", "SKIPPED"]
        assert reasons(ones.requires_grad_(), x, grad=True) == ["TRAINABLE", "TRAINABLE"]
        assert reasons(ones, x, grad=False) == ["REWRITTEN", "REWRITTEN"]
        assert reasons(frozen(nn.Linear(3, 3)).double(), x.double()) == ["DTYPE"]
        assert reasons(OneWeight(lambda x, w: F.linear(x, w * 2), 4, 3), x) == ["NOT_CONSTANT"]
        assert reasons(OneWeight(lambda x, w: F.linear(x, w.add_(1)), 4, 3), x) == ["MUTATED"]
        assert reasons(OneWeight(lambda x, w: (w.add_(1), F.linear(x, w))[1], 4, 3), x) == ["MUTATED"]
        assert reasons(OneWeight(F.linear, 3), x) == ["SHAPE"]
        assert reasons(OneWeight(F.linear, 1, 131073), torch.ones(1, 131073)) == ["SHAPE"]

    def test_output_embeddings(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.body, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)

            def forward(self, tokens, tied):
                x = self.body(self.embedding(tokens))
                return F.linear(x, self.embedding.weight), self.lm_head(x)

        args = (torch.ones(2, 3, dtype=torch.long), torch.ones(1))
        assert reasons(frozen(Tied()), *args) == ["REWRITTEN", "OUTPUT_EMBEDDING", "OUTPUT_EMBEDDING"]
        assert reasons(frozen(Tied()), *args, skip_output_embeddings=False) == ["REWRITTEN"] * 3

    def test_skip_patterns(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.ModuleDict({"q_proj": nn.Linear(3, 3), "o_proj": nn.Linear(3, 3)})
                self.mlp = nn.Linear(3, 3)

            def forward(self, x):
                return self.mlp(self.attention["o_proj"](self.attention["q_proj"](x)))

        model = frozen(nn.Sequential(Layer(), Layer()))

        def skipped(*patterns: str) -> list[str]:
            sites = rewrite(model, torch.ones(2, 3), llm_int8_skip_modules=list(patterns))[1].sites.values()
            return [s.path for s in sites if s.reason is Reason.SKIPPED]

        assert skipped("0.mlp") == ["0.mlp"]
        assert skipped("mlp") == ["0.mlp", "1.mlp"]
        assert skipped("attention") == [f"{i}.attention.{p}_proj" for i in (0, 1) for p in "qo"]
        assert skipped("*.q_proj", "1.mlp") == ["0.attention.q_proj", "1.attention.q_proj", "1.mlp"]
        assert skipped("1") == ["1.attention.q_proj", "1.attention.o_proj", "1.mlp"]
        assert skipped("proj", "lp") == []


class Attention(nn.Module):
    """Two linears on one activation, with something done in between."""

    def __init__(self, between=lambda x: x, second=lambda x: x, bias: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(3, 4, bias=bias[0]), nn.Linear(3, 5, bias=bias[1])
        self.between, self.second = between, second
        self.requires_grad_(False)

    def forward(self, x):
        q = self.q(x)
        x = self.between(x)
        return q, self.k(self.second(x))


class TestShare(TestCase):
    """Without ``merge``, which would join the linears of these."""

    def test_one_activation_two_linears(self):
        self.assertExpectedInline(
            golden(Attention(), torch.ones(2, 3), upto="share", disable_passes=["merge"]),
            """\
%0 = input : f32[2, 3]
%1 = int8 "q.weight" : i8[4, 3]
%2 = scale "q.weight" : f32[4]
%3 = int8 "k.weight" : i8[5, 3]
%4 = scale "k.weight" : f32[5]
%5 = int8compile.quantize_rowwise(%0, 6) : (i8[2, 3], f32[2], bool[3])
%6 = operator.getitem(%5, 0) : i8[2, 3]
%7 = operator.getitem(%5, 1) : f32[2]
%8 = operator.getitem(%5, 2) : bool[3]
%9 = int8compile.scaled_mm(%6, %7, %0, %8, %1, %2, None, f32, 0) : f32[2, 4]
%10 = int8compile.scaled_mm(%6, %7, %0, %8, %3, %4, None, f32, 0) : f32[2, 5]
return (%9, %10)
""",
        )

    def test_without_outliers_there_is_no_mask(self):
        self.assertExpectedInline(
            golden(Attention(), torch.ones(2, 3), upto="share", disable_passes=["merge"], llm_int8_threshold=0),
            """\
%0 = input : f32[2, 3]
%1 = int8 "q.weight" : i8[4, 3]
%2 = scale "q.weight" : f32[4]
%3 = int8 "k.weight" : i8[5, 3]
%4 = scale "k.weight" : f32[5]
%5 = int8compile.quantize_rowwise(%0, 0) : (i8[2, 3], f32[2], bool[3])
%6 = operator.getitem(%5, 0) : i8[2, 3]
%7 = operator.getitem(%5, 1) : f32[2]
%8 = int8compile.scaled_mm(%6, %7, %0, None, %1, %2, None, f32, 0) : f32[2, 4]
%9 = int8compile.scaled_mm(%6, %7, %0, None, %3, %4, None, f32, 0) : f32[2, 5]
return (%8, %9)
""",
        )

    def test_untouched(self):
        """(1) a single reader (2) different activations (3)-(8) the activation, or what it is a view of, is changed in
        place between its readers (9) gradients are switched between them"""

        def no_grad(x):
            x.tracer.create_proxy("call_function", torch._C._set_grad_enabled, (False,), {})
            return x

        def write(change):
            def between(x):
                change(x)
                return x

            return between

        self.addCleanup(torch.set_grad_enabled, torch.is_grad_enabled())
        changes = {
            "method": write(lambda x: x.add_(1)),
            "view": write(lambda x: x.view(-1).mul_(2)),
            "operator": write(lambda x: x.tracer.create_proxy("call_function", operator.iadd, (x, 1), {})),
            "out": write(lambda x: torch.add(x, 1, out=x)),
            "inplace": write(lambda x: F.relu(x, inplace=True)),
            "setitem": write(lambda x: x.tracer.create_proxy("call_function", operator.setitem, (x, 0, 1.0), {})),
            "region": no_grad,
        }
        for name, between in changes.items():
            captured, _ = rewrite(Attention(between), torch.ones(2, 3), upto="share", disable_passes=["merge"])
            assert not captured.graph.find_nodes(op="call_function", target=quantize_rowwise), name
        captured, _ = rewrite(
            Attention(second=lambda x: x + 1), torch.ones(2, 3), upto="share", disable_passes=["merge"]
        )
        assert len(captured.graph.find_nodes(op="call_function", target=linear)) == 2

    def test_a_change_after_the_last_reader_does_not_matter(self):
        class After(Attention):
            def forward(self, x):
                q, k = self.q(x), self.k(x)
                x.add_(1)
                return q, k

        captured, _ = rewrite(After(), torch.ones(2, 3), upto="share", disable_passes=["merge"])
        assert len(captured.graph.find_nodes(op="call_function", target=scaled_mm)) == 2


class TestMerge(TestCase):
    def test_two_linears_become_one(self):
        self.assertExpectedInline(
            golden(Attention(), torch.ones(2, 3), upto="merge"),
            """\
%0 = input : f32[2, 3]
%1 = int8 "q.weight+k.weight" : i8[9, 3]
%2 = scale "q.weight+k.weight" : f32[9]
%3 = int8compile.linear(%0, %1, %2, None, 6, 'column') : f32[2, 9]
%4 = aten.narrow(%3, -1, 0, 4) : f32[2, 4]
%5 = aten.clone(%4, memory_format=torch.contiguous_format) : f32[2, 4]
%6 = aten.narrow(%3, -1, 4, 5) : f32[2, 5]
%7 = aten.clone(%6, memory_format=torch.contiguous_format) : f32[2, 5]
return (%5, %7)
""",
        )

    def test_missing_biases_are_zeros(self):
        self.assertExpectedInline(
            golden(Attention(bias=(True, False)), torch.ones(2, 3), upto="merge"),
            """\
%0 = input : f32[2, 3]
%1 = weight "q.bias" : f32[4]
%2 = int8 "q.weight+k.weight" : i8[9, 3]
%3 = scale "q.weight+k.weight" : f32[9]
%4 = aten.new_zeros(%1, [5]) : f32[5]
%5 = aten.cat([%1, %4]) : f32[9]
%6 = int8compile.linear(%0, %2, %3, %5, 6, 'column') : f32[2, 9]
%7 = aten.narrow(%6, -1, 0, 4) : f32[2, 4]
%8 = aten.clone(%7, memory_format=torch.contiguous_format) : f32[2, 4]
%9 = aten.narrow(%6, -1, 4, 5) : f32[2, 5]
%10 = aten.clone(%9, memory_format=torch.contiguous_format) : f32[2, 5]
return (%8, %10)
""",
        )

    def test_dynamic_batch(self):
        self.assertExpectedInline(
            golden(Attention(), torch.ones(2, 3), upto="merge", dynamic=True),
            """\
%0 = input : f32[s0, 3]
%1 = int8 "q.weight+k.weight" : i8[9, 3]
%2 = scale "q.weight+k.weight" : f32[9]
%3 = int8compile.linear(%0, %1, %2, None, 6, 'column') : f32[s0, 9]
%4 = aten.narrow(%3, -1, 0, 4) : f32[s0, 4]
%5 = aten.clone(%4, memory_format=torch.contiguous_format) : f32[s0, 4]
%6 = aten.narrow(%3, -1, 4, 5) : f32[s0, 5]
%7 = aten.clone(%6, memory_format=torch.contiguous_format) : f32[s0, 5]
return (%5, %7)
""",
        )

    def test_untouched(self):
        """(1) pass disabled (2) a single reader (3) a bias computed after the first product (4) gradients are
        switched between them"""
        x = torch.ones(2, 3)

        class Late(Attention):
            def forward(self, x):
                q = self.q(x)
                return q, F.linear(x, self.k.weight, q.sum(0)[:1].expand(5))

        def no_grad(x):
            x.tracer.create_proxy("call_function", torch._C._set_grad_enabled, (False,), {})
            return x

        cases = {
            "disabled": (Attention(), {"disable_passes": ["merge"]}),
            "single": (Attention(second=lambda x: x + 1), {}),
            "late": (Late(), {}),
            "region": (Attention(no_grad), {}),
        }
        self.addCleanup(torch.set_grad_enabled, torch.is_grad_enabled())
        for name, (module, options) in cases.items():
            assert golden(module, x, upto="merge", **options) == golden(module, x, upto="quantize"), name
