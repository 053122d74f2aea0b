"""A real model, SmolLM2-135M, through export, save, load and package: the numbers of the compiled model.

Bits cannot be asked for end to end. Whoever computes the float operations between the linears (inductor, or PyTorch's
own kernels) rounds them their own way; inputs of the first linears agree to 1e-6, but sooner or later the last bit of
one moves an activation across the half between two codes, and a flipped code is worth a million of those. From there
on the runs part, until they are as far from each other as each is from the float model, in another direction: by
nothing but rounding, which a run whose embeddings are one bit off shows by parting just as far.
"""

import pytest
import torch
import transformers
from gold import FP32_BOUND, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import int8compile
import int8compile.backend
from benchmarks.smollm2 import folder
from int8compile.ops import linear, quantize_rowwise

pytestmark = pytest.mark.slow

TEXT = "The capital of France is Paris, a city on the river Seine."
ANY = torch.export.Dim.DYNAMIC


@pytest.fixture(scope="module")
def smollm2():
    path = folder()
    ids = transformers.AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt")["input_ids"]
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), ids


@pytest.fixture(scope="module")
def program(smollm2, tmp_path_factory):
    """What ``load`` gives back, of any batch and length."""
    model, ids = smollm2
    inputs = {"input_ids": ids.repeat(2, 1), "use_cache": False}
    exported = int8compile.export(model, (), inputs, {"input_ids": {0: ANY, 1: ANY}, "use_cache": None})
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.pt2"
    int8compile.save(exported, path)
    return int8compile.load(path)


class Activations(TorchDispatchMode):
    """Collects what each int8 linear is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is linear:
            self.found.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def activations(run, ids) -> list[torch.Tensor]:
    with Activations() as mode, torch.no_grad():
        run(input_ids=ids, use_cache=False)
    return mode.found


@pytest.fixture(scope="module")
def check(smollm2, program):
    """Asserts that an output differs from the loaded program's by no more than rounding makes of it."""
    model, ids = smollm2
    inputs = {"input_ids": ids, "use_cache": False}
    run = program.module()
    with torch.no_grad():
        exact, loaded = model(**inputs).logits, run(**inputs)["logits"]
        run.model.embed_tokens.weight.mul_(1 + torch.finfo(torch.float32).eps)
        noise = relative_error(run(**inputs)["logits"], loaded)
        run.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    quantization = relative_error(loaded, exact)
    assert noise < 2 * quantization < 0.5

    def check(out: torch.Tensor) -> None:
        # Errors of a size that have nothing to do with each other are sqrt(2) of it apart.
        assert relative_error(out, loaded) < 2 * min(max(noise, FP32_BOUND), quantization)
        assert relative_error(out, exact) < 1.5 * quantization

    return check


@torch.no_grad()
def test_the_loaded_program_gives_the_compiled_models_numbers(smollm2, check):
    model, ids = smollm2
    check(torch.compile(model, backend="int8")(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def test_the_package_gives_them_too(smollm2, program, check, tmp_path):
    _, ids = smollm2
    run = int8compile.load_package(int8compile.package(program, tmp_path / "smollm2.aoti.pt2"))
    check(run(input_ids=ids, use_cache=False)["logits"])


def test_the_first_layer_sees_what_it_sees_compiled(smollm2):
    """To float32's rounding, and so to the same codes but for a few that lie on a half."""
    _, ids = smollm2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32, num_hidden_layers=1).eval()
    inputs = {"input_ids": ids, "use_cache": False}
    ours = activations(int8compile.export(model, (), inputs).module(), ids)
    assert [tuple(x.shape[2:]) for x in ours] == [(576,), (576,), (576,), (1536,)]  # qkv, o, gate and up, down
    theirs = compiled_activations(model, ids)
    for x, y in zip(ours, theirs, strict=True):
        assert relative_error(x, y) < 1e-5
        (codes, _, outliers), (expected, _, expected_outliers) = quantize_rowwise(x, 6.0), quantize_rowwise(y, 6.0)
        assert torch.equal(outliers, expected_outliers)
        assert (codes != expected).sum() <= 1e-4 * codes.numel() + 1


def compiled_activations(model, ids) -> list[torch.Tensor]:
    """Of the model as inductor compiled it."""
    found: list[torch.Tensor] = []

    def backend(gm, example_inputs):
        compiled = int8compile.backend.int8(gm, example_inputs)

        def call(*args):
            with Activations() as mode:
                out = compiled(*args)
            found.extend(mode.found)
            return out

        return call

    with torch.no_grad():
        torch.compile(model, backend=backend)(input_ids=ids, use_cache=False)
    return found
