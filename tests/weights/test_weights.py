"""Compiled code sees the weights as they are now, and nothing outlives or duplicates them."""

import gc
import threading
import weakref

import pytest
import torch
from compiling import compile_eager, int8_linear
from torch import nn
from torch.nn import functional as F

import int8compile
from int8compile.native import loader
from int8compile.ops import quantize_weight
from int8compile.weights.int8_weight import FloatWeight
from int8compile.weights.stamps import unchanged_from_now
from int8compile.weights.store import STORE, WeightStore


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        return self.fc(x)


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))


def expected(model: Net, x: torch.Tensor = X) -> torch.Tensor:
    return int8_linear(x, model.fc.weight, model.fc.bias)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


class TestCompiledCodeSeesTheWeights:
    def test_two_instances_share_one_compile_and_not_their_weights(self):
        one, two = Net(1), Net(2)
        compiled = compile_eager(lambda model, x: model(x))
        for model in (one, two, one):
            assert torch.equal(compiled(model, X), expected(model))
        assert len(compiled.graphs) == 1

    def test_in_place_update(self):
        model = Net()
        compiled = compile_eager(model)
        before = compiled(X)
        model.fc.weight.mul_(2)
        assert torch.equal(compiled(X), expected(model))
        assert not torch.equal(compiled(X), before)

    def test_load_state_dict(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        model.load_state_dict(Net(7).state_dict())
        assert torch.equal(compiled(X), expected(Net(7)))

    def test_optimizer_step(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        model.fc.weight.grad = torch.ones_like(model.fc.weight)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        assert torch.equal(compiled(X), expected(model))

    def test_replaced_parameter(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        model.fc.weight = nn.Parameter(torch.randn(8, 16))
        assert torch.equal(compiled(X), expected(model))
        assert len(compiled.graphs) == 1

    def test_data_assignment(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        model.fc.weight.data = torch.randn(8, 16)
        assert torch.equal(compiled(X), expected(model))

    @pytest.mark.parametrize("turned", [lambda w: w.t(), lambda w: w.view(32, 8)], ids=["transposed", "viewed"])
    def test_data_assigned_from_the_same_memory(self, turned):
        model = Net()
        model.fc = nn.Linear(16, 16, bias=False)
        compiled = compile_eager(model)
        compiled(X)
        model.fc.weight.data = turned(model.fc.weight.data)
        x = X[:, : model.fc.weight.shape[1]]
        assert torch.equal(compiled(x), int8_linear(x, model.fc.weight, None))

    def test_data_assignment_back_and_forth_at_one_address(self):
        """The allocator hands out the same address again: the pointer alone would not tell."""
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        for seed in range(8):
            model.fc.weight.data = torch.empty(0)
            model.fc.weight.data = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(compiled(X), expected(model))

    def test_another_view_of_the_same_storage(self):
        model, flat = Net(), torch.randn(2, 8, 16)
        compiled = compile_eager(model)
        for i in (0, 1, 0):
            model.fc.weight.data = flat[i]
            assert torch.equal(compiled(X), expected(model))

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
    def test_fused_optimizer_step(self, optimizer):
        """PyTorch counts no version, and one row is where no sample is taken: the step itself has to tell."""
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        model.fc.weight.grad = torch.zeros_like(model.fc.weight)
        model.fc.weight.grad[0] = 1
        optimizer([model.fc.weight], lr=0.5, fused=True).step()
        assert torch.equal(compiled(X), expected(model))

    def test_an_optimizer_step_leaves_frozen_weights_be(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        int8_form = STORE.resolve([FloatWeight(model.fc.weight)])
        model.fc.bias.grad = torch.ones_like(model.fc.bias)
        torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step()
        assert STORE.resolve([FloatWeight(model.fc.weight)]) is int8_form
        assert torch.equal(compiled(X), expected(model))

    def test_compiled_optimizer_step(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        step = torch.compile(torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step, backend="aot_eager")
        for scale in (1, 2):
            model.fc.weight.grad = torch.zeros_like(model.fc.weight)
            model.fc.weight.grad[0] = scale
            step()
            assert torch.equal(compiled(X), expected(model))

    @pytest.mark.parametrize(
        "write",
        [
            lambda weight: weight.data.copy_(torch.randn(8, 16)),
            lambda weight: setattr(weight, "data", weight.data.add_(1)),
            lambda weight: weight.detach().numpy().fill(3),
        ],
        ids=["data.copy_, as EMA copies", "data +=, as merged adapters", "NumPy"],
    )
    def test_writes_that_pytorch_does_not_count(self, write):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        write(model.fc.weight)
        assert torch.equal(compiled(X), expected(model))

    def test_partial_writes_that_pytorch_does_not_count_need_invalidate(self):
        model = Net()
        compiled = compile_eager(model)
        before = compiled(X)
        model.fc.weight.data[0] = 3
        assert torch.equal(compiled(X), before), "PyTorch counts no version here; if it does now, drop invalidate()"
        int8compile.invalidate(model)
        assert torch.equal(compiled(X), expected(model))
        model.fc.weight.data[0] = 4
        int8compile.invalidate(model.fc.weight)
        assert torch.equal(compiled(X), expected(model))
        with pytest.raises(TypeError, match=r"weights is str; expected a torch\.nn\.Module or a tensor"):
            int8compile.invalidate("model")

    def test_inference_mode_and_inference_tensors(self):
        with torch.inference_mode():
            model = Net()
            compiled = compile_eager(model)
            assert torch.equal(compiled(X), expected(model))
            model.load_state_dict(Net(7).state_dict())
            assert torch.equal(compiled(X), expected(Net(7)))
        model = Net()
        with torch.inference_mode():
            compiled = compile_eager(model)
            compiled(X)
        assert not STORE.resolve([FloatWeight(model.fc.weight)]).weight.is_inference()

    def test_tied_weights_are_quantized_once(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(self.a(x))

        model = Tied()
        compiled = compile_eager(model)
        want = int8_linear(int8_linear(X, model.a.weight, model.a.bias), model.a.weight, model.b.bias)
        assert torch.equal(compiled(X), want)
        assert STORE.nbytes() == 16 * 16 + 4 * 16

    def test_a_weight_multiplied_plain_and_transposed(self):
        """An autoencoder with tied weights: two int8 forms, because a scale is one an output channel."""

        class Autoencoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 16))

            def forward(self, x):
                return F.linear(x, self.weight) @ self.weight

        model = Autoencoder()
        code = int8_linear(X, model.weight, None)
        assert torch.equal(compile_eager(model)(X), int8_linear(code, model.weight.t(), None))
        (use,) = int8compile.last_report().graphs[0].weights
        assert use.int8_bytes == STORE.nbytes() == 2 * 8 * 16 + 4 * (8 + 16)

    def test_a_weight_merged_with_another_and_used_alone(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

            def forward(self, x):
                return self.a(self.a(x) + self.b(x))

        model = Twice()
        a, b = (int8_linear(X, layer.weight, None) for layer in (model.a, model.b))
        assert torch.equal(compile_eager(model)(X), int8_linear(a + b, model.a.weight, None))
        assert STORE.nbytes() == 2 * (16 * 16 + 4 * 16)

    def test_weight_used_by_a_linear_and_by_something_else(self):
        weight = nn.Parameter(torch.randn(8, 16))

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = weight

            def forward(self, x):
                return F.linear(x, self.weight), self.weight.sum()

        product, total = compile_eager(Both())(X)
        assert torch.equal(product, int8_linear(X, weight, None))
        assert torch.equal(total, weight.sum())

    def test_threads(self):
        models = [Net(i) for i in range(4)]
        compiled = compile_eager(lambda model, x: model(x))
        compiled(models[0], X)
        wrong: list[int] = []

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    model = models[i % 4]
                    if not torch.equal(compiled(model, X), expected(model)):
                        wrong.append(i)
                    int8compile.invalidate(models[(i + 1) % 4])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_dynamic_batch_and_sequence_compile_at_most_twice(self, dynamic):
        model = Net()
        compiled = compile_eager(model)
        for batch, length in ((2, 3), (4, 5), (6, 7), (3, 9), (8, 2)):
            x = torch.randn(batch, length, 16)
            assert torch.equal(compiled(x), expected(model, x))
        assert len(compiled.graphs) <= 2


class TestLifetime:
    def test_no_reference_cycle_and_the_int8_form_dies_with_its_weight(self):
        model = Net()
        compiled = compile_eager(lambda model, x: model(x))
        compiled(model, X)
        int8_form = weakref.ref(STORE.resolve([FloatWeight(model.fc.weight)]).weight)
        weight = weakref.ref(model.fc.weight)
        torch._dynamo.reset()  # Dynamo's own guards hold the model
        gc.collect()
        gc.disable()
        try:
            del model
            assert weight() is None
            assert int8_form() is None
        finally:
            gc.enable()
        assert len(STORE) == 0

    def test_replaced_weight_takes_its_int8_form_along(self):
        model = Net()
        compiled = compile_eager(model)
        compiled(X)
        model.fc.weight = nn.Parameter(torch.randn(8, 16))
        compiled(X)
        gc.collect()
        assert len(STORE) == 1

    def test_dynamo_reset_frees(self):
        model = nn.Sequential(nn.Linear(16, 8))
        torch.compile(model, backend="int8", options={"min_features": 0})(X)
        assert STORE.nbytes() == 16 * 8 + 4 * 8
        torch._dynamo.reset()
        assert STORE.nbytes() == 0


class TestStore:
    def test_members_of_a_merged_weight_are_views_of_it(self):
        store, weights = WeightStore(), [torch.randn(n, 16) for n in (8, 4, 4)]
        alone = store.resolve([FloatWeight(weights[0])])
        merged = store.resolve([FloatWeight(w) for w in weights])
        assert store.nbytes() == 16 * 16 + 4 * 16
        assert torch.equal(merged.weight[:8], alone.weight)
        for w, start in zip(weights, (0, 8, 12), strict=True):
            part = store.resolve([FloatWeight(w)])
            assert part.weight.data_ptr() == merged.weight[start:].data_ptr()
            codes, scale = quantize_weight(w)
            assert torch.equal(part.weight, codes)
            assert torch.equal(part.weight_scale, scale)

    def test_one_changed_member_requantizes_the_merged_weight(self):
        store, weights = WeightStore(), [torch.randn(n, 16) for n in (8, 4)]
        members = [FloatWeight(w) for w in weights]
        first = store.resolve(members)
        assert store.resolve(members) is first
        weights[1].mul_(3)
        second = store.resolve(members)
        assert torch.equal(second.weight[:8], first.weight[:8])
        assert torch.equal(second.weight_scale[8:], quantize_weight(weights[1])[1])
        # The old matrix may still be in use, by another thread or saved for a backward pass.
        assert second.weight.data_ptr() != first.weight.data_ptr()

    def test_transposed_weights_are_stored_n_k(self):
        weight = torch.randn(16, 8)
        int8_form = WeightStore().resolve([FloatWeight(weight, True)])
        codes, scale = quantize_weight(weight.t())
        assert int8_form.weight.is_contiguous()
        assert torch.equal(int8_form.weight, codes)
        assert torch.equal(int8_form.weight_scale, scale)

    def test_large_weights_are_quantized_in_slices(self, monkeypatch):
        monkeypatch.setattr("int8compile.weights.int8_weight._CHUNK", 64)
        weight = torch.randn(37, 16)
        int8_form = WeightStore().resolve([FloatWeight(weight)])
        assert torch.equal(int8_form.weight, quantize_weight(weight)[0])
        assert torch.equal(int8_form.weight_scale, quantize_weight(weight)[1])


@pytest.fixture(params=["native", "python"])
def watch(request, monkeypatch):
    """``unchanged_from_now`` with C++, and without."""
    if request.param == "native":
        loader.load("common")
    else:
        monkeypatch.setattr(loader, "_loaded", set())
    return unchanged_from_now


class TestStamps:
    def test_unchanged(self, watch):
        ws = [torch.randn(4, 4), nn.Parameter(torch.randn(3, 3)), torch.randn(8, 4)[2:4], torch.empty(0)]
        unchanged = watch(ws)
        ws += [torch.randn(3, 5, dtype=torch.bfloat16).t(), torch.randn(8, 64)[:, ::2], torch.zeros(1)]
        unchanged = watch(ws)
        assert unchanged(list(ws))
        assert watch([])([])

    @pytest.mark.parametrize(
        "change",
        [
            lambda ws: ws[1].add_(1),
            lambda ws: ws.__setitem__(1, ws[1].clone()),
            lambda ws: setattr(ws[1], "data", ws[1].data.clone()),
            lambda ws: setattr(ws[1], "data", ws[1].data.view(-1)[4:8]),
            lambda ws: setattr(ws[1], "data", ws[1].data.t()),
            lambda ws: setattr(ws[3], "data", ws[3].data[:2]),
            lambda ws: setattr(ws[3], "data", ws[3].data.view(torch.int32)),
            lambda ws: ws.reverse(),
            lambda ws: ws[1].share_memory_(),
            lambda ws: ws[1].data.add_(1),
            lambda ws: ws[2].data.add_(1),
        ],
        ids=[
            "in place",
            "replaced",
            "data assigned",
            "another view",
            "transposed",
            "cut short",
            "another dtype",
            "swapped",
            "memory shared",
            "uncounted",
            "[K, N]",
        ],
    )
    def test_changes_are_seen(self, watch, change):
        ws = [torch.randn(4, 4), torch.randn(4, 4), torch.randn(33, 7).t(), torch.ones(4, 4)]
        unchanged = watch(ws)
        change(ws)
        assert not unchanged(ws)
        assert watch(ws)(ws)

    def test_memory_freed_and_given_out_again_is_not_the_same(self, watch):
        w = torch.randn(64, 64)
        unchanged = watch([w])
        for _ in range(20):  # until the allocator gives out the same block
            w.data = torch.randn(1)
            w.data = torch.randn(64, 64)
            assert not unchanged([w])

    def test_inference_tensors_have_no_version(self, watch):
        with torch.inference_mode():
            w = torch.randn(4, 4)
        assert watch([w])([w])

    def test_nothing_is_kept_alive(self, watch):
        w = torch.randn(4, 4)
        gone = weakref.ref(w)
        unchanged = watch([w])
        del w
        gc.collect()
        assert gone() is None
        assert not unchanged([torch.randn(4, 4)])
