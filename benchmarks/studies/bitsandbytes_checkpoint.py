"""One int8 checkpoint, made by bitsandbytes, run by bitsandbytes and by this package: is it the same model?

    python -m benchmarks.studies.bitsandbytes_checkpoint                 # SmolLM2-135M on the CPU, a few minutes
    python -m benchmarks.studies.bitsandbytes_checkpoint --windows 64 --json results.json

Two right computations of one int8 model do not agree on its perplexity to many digits. Rounding flips an activation's
code here and there, each flip travels on, and after thirty layers the two are different draws of the same quantisation
noise. So there are two answers:

* layers: each linear gets what bitsandbytes' own linear got, so that nothing travels on. bitsandbytes casts activations
  to fp16 before it quantises them (this package takes them as they are); with that one cast put in, every code
  must be the same, and outputs must agree to the 2e-5 by which its CPU path mistypes 1 / 127**2.
* perplexity: of both, of this package with that cast, and with its inputs off by one part in a million, each held
  against bitsandbytes window by window. What the last does to the figure is what the figure means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import typer
from rich.console import Console
from torch.nn.functional import cross_entropy

from benchmarks import common
from benchmarks.peers import AbsentError, peer
from int8compile import Int8Linear
from int8compile.ops import quantize_rowwise, scaled_mm

NOISE = 1e-6  # relative; about eight roundings of float32

Forward = Callable[[Int8Linear, torch.Tensor], torch.Tensor]


def main(
    model: Annotated[str | None, typer.Option(help="transformers folder or hub id; default: SmolLM2-135M")] = None,
    windows: Annotated[int, typer.Option(help="of text, for perplexity", min=2)] = 8,
    length: Annotated[int, typer.Option(help="tokens of a window", min=8)] = 512,
    compiled: Annotated[bool, typer.Option(help="run backend='int8' on the checkpoint too")] = True,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Compare bitsandbytes and this package on a checkpoint of bitsandbytes'."""
    import transformers

    if model is None:
        from benchmarks.smollm2 import folder

        model = str(folder())
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = common.token_windows(tokenizer, windows, length)
    console = Console(highlight=False, stderr=json_file == "-")
    try:
        theirs, ours = load_both(model)
    except AbsentError as error:
        console.print(f"[yellow]absent[/]: {error}")
        raise typer.Exit(0) from error
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with common.progress() as progress:
        task = progress.add_task("layers", total=None)
        layers = compare_layers(theirs, ours, texts[0])
        progress.update(task, description="perplexity", total=len(texts))
        runs = _runs(plain.eval(), theirs, ours, compiled)
        nlls: dict[str, list[float]] = {name: [] for name in runs}
        for text in texts:
            for name, run in runs.items():
                nlls[name].append(run(text))
            progress.advance(task)
    output = {
        "kind": "bitsandbytes_checkpoint",
        "machine": common.machine(),
        "model": model,
        "length": length,
        "layers": {name: dataclasses.asdict(layer) for name, layer in layers.items()},
        "window_nll": nlls,
    }
    console.print(_layer_table(layers))
    console.print(_perplexity_table(nlls, length))
    common.write_json(output, json_file)


def load_both(path: str, threshold: float = 6.0) -> tuple[Any, Any]:
    """A float checkpoint quantised by bitsandbytes, and what this package loads of the int8 one that it saves.

    Raises:
        AbsentError: bitsandbytes is not installed.
    """
    peer("bitsandbytes")
    import transformers

    from int8compile.integrations.transformers import take_over_bitsandbytes

    family, where = transformers.AutoModelForCausalLM, {"device_map": "cpu", "dtype": torch.float32}
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    theirs: Any = family.from_pretrained(path, quantization_config=config, **where)
    with tempfile.TemporaryDirectory() as work:
        theirs.save_pretrained(work)
        take_over_bitsandbytes()
        try:
            ours: Any = family.from_pretrained(work, **where)
        finally:
            take_over_bitsandbytes(False)
    return theirs.eval(), ours.eval()


def as_it_is(module: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    return Int8Linear.forward(module, x)


def with_their_cast(module: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """Codes are those of the activation in fp16; outlier features are multiplied as they are."""
    codes, scale, outliers = quantize_rowwise(x.half(), module.threshold)
    out: torch.Tensor = scaled_mm(codes, scale, x, outliers, module.weight, module.weight_scale, module.bias, x.dtype)
    return out


def with_noise(module: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    return Int8Linear.forward(module, x * (1 + NOISE * torch.randn_like(x)))


@dataclasses.dataclass
class Layers:
    """Differences from bitsandbytes' linears over all of a model's.

    ``codes``: share of activation codes, outlier columns aside, that are others; ``median`` and ``worst``: relative
    error of the output.
    """

    count: int
    codes: float
    median: float
    worst: float


def compare_layers(theirs: Any, ours: Any, tokens: list[int]) -> dict[str, Layers]:
    """Each int8 linear of ``ours`` on the activations that bitsandbytes' linears meet in one run of ``theirs``."""
    functional, linear8bit = peer("bitsandbytes", "functional"), peer("bitsandbytes", "nn").Linear8bitLt
    ways = {"as it is": (as_it_is, torch.float32), "with bitsandbytes' cast": (with_their_cast, torch.float16)}
    errors: dict[str, list[float]] = {name: [] for name in ways}
    flips, total = dict.fromkeys(ways, 0), 0

    def compare(path: str, module: Any, arguments: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        (x,), mine = arguments, ours.get_submodule(path)
        assert torch.equal(mine.weight, module.state.CB)
        assert torch.equal(mine.weight_scale, module.state.SCB / 127)
        flat = x.reshape(-1, x.shape[-1])
        their_codes, _, columns = functional.int8_vectorwise_quant(flat.half(), threshold=module.state.threshold)
        inliers = torch.ones(flat.shape[1], dtype=torch.bool).index_fill(0, columns, False)
        total += flat.shape[0] * int(inliers.sum())
        for name, (forward, dtype) in ways.items():
            codes, _, _ = quantize_rowwise(flat.to(dtype), mine.threshold)
            flips[name] += int((codes != their_codes)[:, inliers].sum())
            errors[name].append(float((forward(mine, x) - out).norm() / out.norm()))

    hooks = [
        module.register_forward_hook(lambda m, x, y, path=path: compare(path, m, x, y))
        for path, module in theirs.named_modules()
        if isinstance(module, linear8bit)
    ]
    theirs(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: Layers(len(hooks), flips[name] / total, statistics.median(errors[name]), max(errors[name]))
        for name in ways
    }


def _runs(plain: Any, theirs: Any, ours: Any, compiled: bool) -> dict[str, Callable[[list[int]], float]]:
    """What is compared, by name: from the tokens of a window to their mean negative log-likelihood (nats)."""

    def run(model: Any, forward: Forward | None = None) -> Callable[[list[int]], float]:
        def score(tokens: list[int]) -> float:
            ids = torch.tensor([tokens])
            with _forward_by(ours, forward):
                logits = model(input_ids=ids, use_cache=False).logits
            return float(cross_entropy(logits[0, :-1].float(), ids[0, 1:]))

        return score

    runs = {"float": run(plain), "bitsandbytes": run(theirs), "int8": run(ours)}
    if compiled:
        runs["int8, compiled"] = run(torch.compile(ours, backend="int8", dynamic=False))
    runs["int8, with bitsandbytes' cast"] = run(ours, with_their_cast)
    for number in (1, 2):
        runs[f"int8, inputs off by {NOISE:g} ({number})"] = run(ours, with_noise)
    return runs


@contextlib.contextmanager
def _forward_by(model: Any, forward: Forward | None) -> Iterator[None]:
    """Within the context the int8 linears of a model compute another forward, if one is given."""
    modules = [m for m in model.modules() if isinstance(m, Int8Linear)] if forward else []
    for module in modules:
        module.forward = functools.partial(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def against(nlls: list[float], reference: list[float]) -> tuple[float, float]:
    """Relative difference of two perplexities over the same windows, and its standard error."""
    differences = [a - b for a, b in zip(nlls, reference, strict=True)]
    return math.expm1(statistics.fmean(differences)), statistics.stdev(differences) / math.sqrt(len(differences))


def _layer_table(layers: dict[str, Layers]) -> rich.table.Table:
    count = next(iter(layers.values())).count
    table = rich.table.Table(
        "int8 linear", box=rich.box.SIMPLE_HEAD, pad_edge=False, title=f"{count} linears on bitsandbytes' activations"
    )
    for name in ("other codes", "output error, median", "worst"):
        table.add_column(name, justify="right")
    for name, layer in layers.items():
        table.add_row(name, f"{layer.codes:.2%}", f"{layer.median:.1e}", f"{layer.worst:.1e}")
    return table


def _perplexity_table(nlls: dict[str, list[float]], length: int) -> rich.table.Table:
    windows = len(nlls["bitsandbytes"])
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title=f"perplexity, {windows} x {length} tokens")
    table.add_column("model", no_wrap=True)
    for name in ("perplexity", "of bitsandbytes", "of int8"):
        table.add_column(name, justify="right")
    for name, values in nlls.items():
        cells = [
            f"{difference:+.2%} ± {error:.2%}"
            for difference, error in (against(values, nlls[other]) for other in ("bitsandbytes", "int8"))
        ]
        table.add_row(name, common.significant(common.perplexity(values), 5), *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
