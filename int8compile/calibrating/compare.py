"""``compare``: what int8 changes of a model, linear by linear."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import rich.box
import rich.console
import rich.table
import torch
from torch import nn
from torch.nn import functional

from int8compile.calibrating.running import evaluating, linears_of, main_argument, run, several, tracked
from int8compile.config import Int8Config
from int8compile.errors import CalibrationError
from int8compile.modules.inplace import Found
from int8compile.modules.int8_linear import Int8Linear
from int8compile.ops import quantize_rowwise

#: from a batch's main input and what the model gave, a number
Loss = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One linear.

    Args:
        path, in_features, out_features: as in a Report.
        sqnr: 10 log10 of the mean square of its output to that of what int8 changes of it, in decibels; given what it
            is given in the float model. None if nothing was called, infinite if nothing was changed.
        outlier_columns: how many columns have outliers, or 16-bit codes by a calibration: the most in a batch.
        loss: how much the loss grows when this linear alone is int8; None if that was not asked for.
    """

    path: str
    in_features: int
    out_features: int
    sqnr: float | None
    outlier_columns: int
    loss: float | None


@dataclasses.dataclass
class Comparison:
    """All linears of a model, and the model with all of them in int8. ``print()`` it for a table, the worst first.

    Args:
        sites: one for each linear, in the model's order.
        loss: of the float model, the mean over batches.
        int8_loss: with all of them in int8.
    """

    sites: list[Difference]
    loss: float
    int8_loss: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; what is not finite is None."""

        def finite(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        sites = [{name: finite(value) for name, value in dataclasses.asdict(site).items()} for site in self.sites]
        return {"loss": self.loss, "int8_loss": self.int8_loss, "sites": sites}

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("linear", overflow="fold")
        for column in ("K x N", "SQNR, dB", "outlier columns", "change of loss"):
            table.add_column(column, justify="right", no_wrap=True)
        for site in sorted(self.sites, key=_badness):
            sqnr = "-" if site.sqnr is None else f"{site.sqnr:.1f}"
            loss = "-" if site.loss is None else f"{site.loss:+.2e}"
            size = f"{site.in_features} x {site.out_features}"
            table.add_row(site.path, size, sqnr, str(site.outlier_columns), loss)
        yield table
        yield f"loss {self.loss:.6g} in float, {self.int8_loss:.6g} in int8 ({self.int8_loss - self.loss:+.2e})"

    def __str__(self) -> str:
        text = io.StringIO()
        rich.console.Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue()


def _badness(site: Difference) -> tuple[float, float]:
    return -(site.loss or 0.0), math.inf if site.sqnr is None else site.sqnr


def compare(
    model: object,
    batches: Iterable[Any],
    config: object = None,
    *,
    loss: Loss | None = None,
    each: bool = True,
    progress: bool = True,
) -> Comparison:
    """Say what int8 changes of a float model on some batches, linear by linear.

    The model is called twice for each batch and, with ``each``, once more for each linear. It is left as it was; beside
    it memory holds its linears in int8.

    Args:
        model: a float model, compiled or not.
        batches: what it is called with, each a tensor, or its arguments as a tuple or a dict. All are held.
        config: options, as for ``torch.compile(..., backend="int8", options=...)``, a calibration for one.
        loss: from a batch's main input (``input_ids``, or the first) and what the model gave to a number. By default
            the model's own, if it gives one; the mean loss of the next token, if it gives logits for token ids; and
            otherwise how far its output is from that of the float model, as the square of their relative difference.
        each: whether to measure the loss with each linear alone in int8, which takes that many calls.
        progress: whether to show a bar on stderr, if that is a terminal.

    Raises:
        CalibrationError: there is no batch, or a batch is not what it should be; no linear of the model becomes int8.
        OptionValueError, OptionNameError: bad options.
    """
    call = "compare(model, batches)"
    options = Int8Config.make(config)
    if options.llm_int8_has_fp16_weight:
        raise CalibrationError(f"{call}: llm_int8_has_fp16_weight=True has no int8 weights; expected False")
    module, linears = linears_of(model, options, call)
    held = list(several(batches, call))
    if not held:
        raise CalibrationError(f"{call}: batches is empty; expected what the model is called with")
    with evaluating(module):
        probes = [_Probe(linear, options) for linear in linears]
        outputs, base = [], []
        with contextlib.ExitStack() as stack:
            for probe in probes:
                stack.enter_context(probe.measuring())
            for batch in held:
                given, output = run(module, batch, call)
                found = _loss(loss, given, output)
                outputs.append(_main(output).detach().clone() if found is None else None)
                base.append(found or 0.0)
        float_loss = sum(base) / len(base)

        def with_int8(chosen: list[_Probe]) -> float:
            with contextlib.ExitStack() as stack:
                for probe in chosen:
                    stack.enter_context(probe.replacing())
                total = 0.0
                for batch, reference in zip(held, outputs, strict=True):
                    given, output = run(module, batch, call)
                    found = _loss(loss, given, output)
                    total += _apart(_main(output), reference) if found is None else found
            return total / len(held)

        int8_loss = with_int8(probes)
        changes = [
            with_int8([probe]) - float_loss if each and probe.called else None
            for probe in tracked(probes, "compare", progress and each)
        ]
    return Comparison([p.difference(c) for p, c in zip(probes, changes, strict=True)], float_loss, int8_loss)


class _Probe:
    """A linear and its int8 form, and what was measured of them."""

    def __init__(self, linear: Found, config: Int8Config) -> None:
        self.linear, self.config = linear, config
        self.int8 = Int8Linear.from_float(linear.module, config, paths=linear.paths)
        self.signal = self.noise = 0.0
        self.columns, self.called = 0, False

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = main_argument(args, kwargs)
            assert x is not None
            self.called = True
            self.signal += float(output.double().square().sum())
            self.noise += float((self.int8(x).double() - output.double()).square().sum())
            self.columns = max(self.columns, self._count(x))

        with _hook(self.linear.module, look):
            yield

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = main_argument(args, kwargs)
            assert x is not None
            return self.int8(x)

        with _hook(self.linear.module, put):
            yield

    def difference(self, loss: float | None) -> Difference:
        site, sqnr = self.linear.site, None
        if self.called and self.signal > 0:
            sqnr = 10 * math.log10(self.signal / self.noise) if self.noise > 0 else math.inf
        return Difference(site.path, site.in_features, site.out_features, sqnr, self.columns, loss)

    def _count(self, x: torch.Tensor) -> int:
        if self.int8.columns is not None:
            return len(self.int8.columns)
        threshold = self.int8.threshold
        return int(quantize_rowwise(x, threshold)[2].sum()) if threshold and self.int8.outlier_policy != "none" else 0


@contextlib.contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _main(output: Any) -> torch.Tensor:
    """The tensor that an output is about: logits, the last hidden state, or the first there is."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            return getattr(output, name)  # type: ignore[no-any-return]
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if not leaves:
        raise CalibrationError(f"compare: the model gives a {type(output).__name__} without a tensor; pass loss=")
    return leaves[0]


def _loss(loss: Loss | None, given: Any, output: Any) -> float | None:
    """The loss that is known of an output alone; None if there is none."""
    if loss is not None:
        return float(loss(given, output))
    own = getattr(output, "loss", None)
    if isinstance(own, torch.Tensor) and own.numel() == 1:
        return float(own)
    main = _main(output)
    ids = isinstance(given, torch.Tensor) and given.dim() == 2 and not given.is_floating_point()
    if ids and main.dim() == 3 and main.shape[:2] == given.shape and main.shape[1] > 1 and hasattr(output, "logits"):
        logits = main[:, :-1].flatten(0, 1).float()
        return float(functional.cross_entropy(logits, given[:, 1:].flatten().to(logits.device)))
    return None


def _apart(output: torch.Tensor, reference: torch.Tensor | None) -> float:
    """The square of the relative difference."""
    assert reference is not None
    difference = (output.double() - reference.double()).square().sum()
    return float(difference / reference.double().square().sum().clamp(min=1e-30))
