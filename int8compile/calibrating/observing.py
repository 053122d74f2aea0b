"""What ``calibrate`` keeps of a model's calls: for each activation that linears read, the largest values of some rows.

Linears that are given the same tensor (q/k/v, gate/up) are one *group*, with the same columns: then their products can
be joined. Of a group as many rows are kept as make a fair sample, evenly spaced among all that come by, and of a row
its largest magnitudes and where they are. So what is kept does not grow with the batches.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from int8compile.calibrating.running import main_argument
from int8compile.errors import CalibrationError
from int8compile.modules.inplace import Found

#: rows kept of an activation, up to twice as many before every second is dropped
ROWS = 512
#: magnitudes kept of a row
LARGEST = 96


class Sample:
    """Some of the rows of a stream, evenly spaced, with what is kept of each: in memory that is taken once."""

    def __init__(self) -> None:
        self._seen, self._stride, self._kept = 0, 1, 0
        self._memory: tuple[torch.Tensor, ...] = ()

    def rows(self, count: int) -> torch.Tensor:
        """Which of the next ``count`` rows are to be kept."""
        while self._kept + count // self._stride + 1 > 2 * ROWS:
            # Every second of all rows there are: those that the doubled stride would have taken.
            for memory in self._memory:
                memory[: (self._kept + 1) // 2] = memory[: self._kept : 2].clone()
            self._kept, self._stride = (self._kept + 1) // 2, 2 * self._stride
        first = min(count, -self._seen % self._stride)
        self._seen += count
        return torch.arange(first, count, self._stride)

    def keep(self, *values: torch.Tensor) -> None:
        """Keep values [rows, ...] of those rows."""
        if not self._memory:
            self._memory = tuple(torch.empty((2 * ROWS, *v.shape[1:]), dtype=v.dtype) for v in values)
        end = self._kept + len(values[0])
        for memory, value in zip(self._memory, values, strict=True):
            memory[self._kept : end] = value
        self._kept = end

    def all(self) -> tuple[torch.Tensor, ...]:
        return tuple(memory[: self._kept] for memory in self._memory)


class Group:
    """Linears that read one activation, and what was seen of it."""

    def __init__(self, first: Found) -> None:
        self.sites = [first]
        self.sample = Sample()
        self.squares = torch.zeros(first.site.in_features, dtype=torch.float64)
        self.seen = 0


class Observer:
    """Hooks on linears; in the context they note what the linears are given and what they give."""

    def __init__(self, linears: Sequence[Found], call: str) -> None:
        self.linears, self.call, self.batch = linears, call, 0
        self.groups: list[Group] = []
        self.outputs: dict[int, Sample] = {}  # by place among the linears
        self._group_of: dict[int, Group] = {}
        self._latest: list[tuple[weakref.ref[torch.Tensor], int, Group]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for at, linear in enumerate(self.linears):

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = at) -> None:
                x = main_argument(args, kwargs)
                if x is not None and x.dim() and x.is_floating_point():
                    self._note(at, x)

            def after(module: nn.Module, args: tuple[Any, ...], output: Any, at: int = at) -> None:
                if isinstance(output, torch.Tensor):
                    self._note_output(at, output)

            handles.append(linear.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(linear.module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reached(self, linear: Found) -> bool:
        return id(linear) in self._group_of

    def _note(self, at: int, x: torch.Tensor) -> None:
        linear = self.linears[at]
        group = self._group_of.get(id(linear)) or self._group_for(linear, x)
        if group.sites[0] is not linear:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"{self.call}: {linear.site.path} is given NaN or infinite values in batch {self.batch}; "
                "no columns can be chosen by those"
            )
        group.squares += rows.float().square().sum(0).double().cpu()
        group.seen += len(rows)
        taken = rows[group.sample.rows(len(rows)).to(rows.device)].float().abs()
        largest = taken.topk(min(LARGEST, taken.shape[1]), dim=1)
        group.sample.keep(largest.values, largest.indices.to(torch.int32))

    def _note_output(self, at: int, output: torch.Tensor) -> None:
        sample = self.outputs.setdefault(at, Sample())
        rows = output.detach().reshape(-1, output.shape[-1])
        sample.keep(rows[sample.rows(len(rows)).to(rows.device)].float().square().sum(1))

    def _group_for(self, linear: Found, x: torch.Tensor) -> Group:
        """That of the linears that were given this very tensor before, or a new one."""
        self._latest = [entry for entry in self._latest if entry[0]() is not None]
        for tensor, version, group in self._latest:
            if tensor() is x and version == x._version and group.sites[0].site.in_features == linear.site.in_features:
                group.sites.append(linear)
                break
        else:
            group = Group(linear)
            self.groups.append(group)
            self._latest.append((weakref.ref(x), x._version, group))
        self._group_of[id(linear)] = group
        return group
