"""What ``calibrate`` and ``compare`` share: the linears in question, and calls of a model on batches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import rich.console
import rich.progress
import torch
from torch import nn

from int8compile.config import Int8Config
from int8compile.errors import CalibrationError
from int8compile.modules.inplace import Found, find_linears
from int8compile.report import Reason
from int8compile.torch_internals.modules import uncompiled


def linears_of(model: object, config: Int8Config, call: str) -> tuple[nn.Module, list[Found]]:
    """A model, not compiled, and those of its linears that a config makes int8.

    Raises:
        CalibrationError: it is no module, or none of its linears becomes int8.
    """
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise CalibrationError(f"{call}: model is {type(model).__name__}; expected a torch.nn.Module")
    found = find_linears(model, config)
    chosen = [linear for linear in found if linear.site.reason is Reason.REWRITTEN]
    if not chosen:
        reasons = ", ".join(sorted({linear.site.reason.name for linear in found})) or "it has none"
        raise CalibrationError(f"{call}: no linear of the model becomes int8 ({reasons}); expected a float model")
    return model, chosen


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; each module is put back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def several(batches: Iterable[Any], call: str) -> Iterable[Any]:
    """The batches, which a lone tensor or dict is not.

    Raises:
        CalibrationError: they are one batch, or nothing that could hold some.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{call}: batches is {type(batches).__name__}; expected a list of batches, or anything that gives them one "
            "by one; of one batch a list is [batch]"
        )
    return batches


def run(model: nn.Module, batch: Any, call: str) -> tuple[Any, Any]:
    """A call of the model on a batch: its main input, and what comes out.

    Raises:
        CalibrationError: a batch that is no tensor, tuple, list or dict, or an empty one.
    """
    if isinstance(batch, torch.Tensor):
        return batch, model(batch)
    if isinstance(batch, Mapping) and batch:
        return batch.get("input_ids", next(iter(batch.values()))), model(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0], model(*batch)
    raise CalibrationError(
        f"{call}: a batch is {type(batch).__name__}{'' if batch else ' and empty'}; expected a tensor, or the model's "
        "arguments as a tuple or a dict"
    )


def tracked(items: Iterable[Any], step: str, show: bool) -> Iterator[Any]:
    """The items, with a bar on stderr, if that is a terminal."""
    console = rich.console.Console(file=sys.stderr)
    total = len(items) if isinstance(items, Sized) else None
    with rich.progress.Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as bars:
        yield from bars.track(items, total=total, description=step)


def main_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The activation that a linear is called with."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    return value if isinstance(value, torch.Tensor) else None


def weight_rows(linear: Found) -> Iterator[torch.Tensor]:
    """A linear's weight as fp32 [some of N, K], a piece at a time."""
    weight = linear.module.weight
    assert isinstance(weight, torch.Tensor)
    rows = weight.detach() if tuple(weight.shape) == (linear.site.out_features, linear.site.in_features) else None
    rows = rows if rows is not None and not _is_conv1d(linear.module) else weight.detach().t()
    for part in rows.split(max(1, (1 << 20) // max(1, rows.shape[1]))):
        yield part.float()


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
