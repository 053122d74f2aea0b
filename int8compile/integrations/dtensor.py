"""torch.distributed's DTensors: how int8compile's operators run on shards, and int8 modules under tensor parallelism.

    from int8compile.integrations.dtensor import ColwiseParallel, RowwiseParallel

    int8compile.quantize_(model)
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    shardable_(model)  # or, for FSDP2, which then gathers a byte a weight
    fully_shard(model)

Importing this file tells DTensor which layouts of an operator's arguments need no communication; it redistributes all
others. (``torch.compile(model, backend="int8")`` of a float model under tensor parallelism needs none of this.)

    linear          x            weight       weight_scale   bias         result
    column-wise     Replicate    Shard(0)     Shard(0)       Shard(0)     Shard(-1)    to the bit what one process gives
    row-wise        Shard(-1)    Shard(1)     Replicate      Partial      Partial
    rows of x       Shard(d)     Replicate    Replicate      Replicate    Shard(d)     not with outlier_policy="column"

Row-wise, each process quantises its own slice of x: with row scales, and outlier columns, of that slice. Rows of x may
be in several processes only where a row's result depends on no other row's: an outlier in one process would mark its
column for the others.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.experimental import register_sharding

from int8compile import ops  # noqa: F401 (which registers the operators)
from int8compile.modules.int8_linear import Int8Linear

_Layouts = list[Placement | None]
_Rule = tuple[_Layouts, _Layouts]

_ops = torch.ops.int8compile


def _rules(arguments: tuple[Any, ...], *layouts: tuple[Placement | None, ...]) -> list[_Rule]:
    """One rule for each tuple: the result's layout, then those of the arguments; None of what is None or no tensor."""
    return [
        ([result], [None if value is None else layout for value, layout in zip(arguments, of_arguments, strict=True)])
        for result, *of_arguments in layouts
    ]


@register_sharding(_ops.linear.default)  # type: ignore[untyped-decorator]
def _linear(
    x: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    threshold: float,
    outlier_policy: str = "column",
    columns: Any = None,
    column_weight: Any = None,
) -> list[_Rule]:
    last, whole = x.ndim - 1, Replicate()
    layouts: list[tuple[Placement | None, ...]] = [
        (whole, whole, whole, whole, whole, None, None, whole, whole),
        (Shard(last), whole, Shard(0), Shard(0), Shard(0), None, None, whole, Shard(0)),
    ]
    if columns is None:  # which are features of the whole x
        layouts.append((Partial(), Shard(last), Shard(1), whole, Partial(), None, None, None, None))
    if outlier_policy != "column" or threshold == 0:
        layouts += [(Shard(d), Shard(d), whole, whole, whole, None, None, whole, whole) for d in range(last)]
    return _rules((x, weight, weight_scale, bias, None, None, columns, column_weight), *layouts)


@register_sharding(_ops.scaled_mm.default)  # type: ignore[untyped-decorator]
def _scaled_mm(
    codes: Any,
    row_scale: Any,
    x: Any,
    outliers: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    out_dtype: torch.dtype,
    residual_from: float = 0.0,
) -> list[_Rule]:
    """As of ``linear``, but that codes, row scales and outliers are those of the whole x."""
    last, whole = x.ndim - 1, Replicate()
    layouts: list[tuple[Placement | None, ...]] = [
        (whole, whole, whole, whole, whole, whole, whole, whole, None, None),
        (Shard(last), whole, whole, whole, whole, Shard(0), Shard(0), Shard(0), None, None),
        (Partial(), Shard(1), whole, Shard(last), Shard(0), Shard(1), whole, Partial(), None, None),
    ]
    if x.ndim == 2:  # else rows of codes in equal parts are not those of x's
        layouts.append((Shard(0), Shard(0), Shard(0), Shard(0), whole, whole, whole, whole, None, None))
    return _rules((codes, row_scale, x, outliers, weight, weight_scale, bias, None, None), *layouts)


@register_sharding(_ops.grouped_linear.default)  # type: ignore[untyped-decorator]
def _grouped_linear(
    x: Any, weight: Any, weight_scale: Any, offsets: Any, bias: Any, threshold: float, outlier_policy: str = "column"
) -> list[_Rule]:
    """Each expert's matrix in shards, never its rows: where they end is said of all of them."""
    whole = Replicate()
    return _rules(
        (x, weight, weight_scale, offsets, bias, None, None),
        (whole, whole, whole, whole, whole, whole, None, None),
        (Shard(1), whole, Shard(1), Shard(1), whole, Shard(1), None, None),
        (Partial(), Shard(1), Shard(2), whole, whole, Partial(), None, None),
    )


@register_sharding(_ops.quantize_rowwise.default)  # type: ignore[untyped-decorator]
def _quantize_rowwise(x: Any, threshold: float) -> list[tuple[list[Placement], _Layouts]]:
    return [([Replicate(), Replicate(), Replicate()], [Replicate(), None])]


@register_sharding(_ops.input_gradient.default)  # type: ignore[untyped-decorator]
def _input_gradient(grad: Any, weight: Any, weight_scale: Any, dtype: torch.dtype) -> list[_Rule]:
    """The transposed product, in floats."""
    last, whole = grad.ndim - 1, Replicate()
    rows = [(Shard(d), Shard(d), whole, whole, None) for d in range(last)]
    return _rules(
        (grad, weight, weight_scale, None),
        (whole, whole, whole, whole, None),
        (Partial(), Shard(last), Shard(0), Shard(0), None),
        (Shard(last), whole, Shard(1), whole, None),
        *rows,
    )


def shardable_(model: nn.Module) -> int:
    """Keep codes and scales of a model's ``Int8Linear`` as Parameters without gradients, in place.

    FSDP2 (``fully_shard``) shards Parameters, and leaves buffers whole in each process.

    Returns:
        how many modules were changed; those that hold Parameters already are not.
    """
    found = [m for m in model.modules() if isinstance(m, Int8Linear) and not isinstance(m.weight, nn.Parameter)]
    for module in found:
        module.hold_parameters_()
    return len(found)


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """PyTorch's style, which takes ``Int8Linear`` as well: int8 weights, scales and bias by output features."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Int8Linear):
            return super()._apply(module, device_mesh)
        return _distributed(self, module, device_mesh, {"weight": Shard(0), "weight_scale": Shard(0), "bias": Shard(0)})


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """PyTorch's style, which takes ``Int8Linear`` as well: int8 weights by input features, scales and bias whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Int8Linear):
            return super()._apply(module, device_mesh)
        self.desired_input_layouts = (Shard(-1),)
        return _distributed(self, module, device_mesh, {"weight": Shard(1)})


def _distributed(style: Any, module: Int8Linear, mesh: DeviceMesh, layouts: dict[str, Placement]) -> nn.Module:
    def partition(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, distribute_tensor(buffer, mesh, [layouts.get(name, Replicate())]))
        for name, parameter in list(part.named_parameters(recurse=False)):
            value = distribute_tensor(parameter, mesh, [layouts.get(name, Replicate())])
            part.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))

    return distribute_module(
        module,
        mesh,
        partition,
        functools.partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        functools.partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
