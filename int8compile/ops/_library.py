"""The ``int8compile::`` operator library and the one way an operator is registered in it.

Each operator is a schema, a check of its arguments, a fake (shapes and dtypes, static), a *reference* body in plain
PyTorch that defines what the operator means, and, where it has one, a gradient. Native kernels register under their own
device key and must match the reference. ``Library.define`` is used rather than ``torch.library.custom_op``, which costs
four times as much a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from int8compile.limits import FLOAT_DTYPES, MAX_IN_FEATURES, SMALLEST_THRESHOLD
from int8compile.torch_internals.tensors import is_fake

LIBRARY = torch.library.Library("int8compile", "DEF")

#: operator -> reference body, for compiling the reference itself through inductor
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    autocast: str | None = None,
) -> torch._ops.OpOverload:
    """Register ``int8compile::<schema>`` and return it.

    Args:
        check: raises ValueError for arguments that do not fit; called with them before ``fake`` and ``reference``.
        fake: makes empty outputs of the right shapes and dtypes.
        reference: computes them.
        autocast: the argument that is taken in the autocast dtype, as a float linear's activation is. Beyond that an
            operator computes the same under autocast as outside.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: torch._ops.OpOverload = getattr(torch.ops.int8compile, name).default
    REFERENCES[op] = _without_tangents(name, _checked(check, reference))
    LIBRARY.impl(name, REFERENCES[op], "CompositeExplicitAutograd")
    torch.library.register_fake(f"int8compile::{name}", _checked(check, fake), lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, _under_autocast(op, autocast), key)
    return op


def _checked(check: Callable[..., None], body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return body(*args, **kwargs)

    return checked


def _without_tangents(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """The body, which refuses forward-mode derivatives: an operator would drop them without a word."""

    @functools.wraps(body)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            # (A fake has none that could be asked for.)
            if isinstance(arg, torch.Tensor) and arg.is_floating_point() and not is_fake(arg) and _has_tangent(arg):
                raise NotImplementedError(
                    f"int8compile::{name}: an operand has a forward-mode tangent (torch.func.jvp, jacfwd, forward_ad); "
                    "an int8 linear has gradients for backward passes only"
                )
        return body(*args, **kwargs)

    return refusing


def _has_tangent(tensor: torch.Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def _under_autocast(op: torch._ops.OpOverload, cast: str | None) -> Callable[..., Any]:
    """The operator with autocast off, after one argument's cast; the dispatcher gives all arguments by position."""
    names = [argument.name for argument in op._schema.arguments]
    at = None if cast is None else names.index(cast)

    def outside(*args: Any) -> Any:
        device = args[at or 0].device.type
        if at is not None:
            args = (*args[:at], args[at].to(torch.get_autocast_dtype(device)), *args[at + 1 :])
        with torch.autocast(device, enabled=False):
            return op(*args)

    return outside


def check(condition: bool, op: str, problem: str) -> None:
    """Raise ValueError ``int8compile::op: problem`` unless the condition holds."""
    if not condition:
        raise ValueError(f"int8compile::{op}: {problem}")


def check_activation(op: str, x: torch.Tensor) -> None:
    check(x.dim() >= 1, op, "x is a scalar; expected a tensor of shape [..., K]")
    check(x.dtype in FLOAT_DTYPES, op, f"x has dtype {x.dtype}; expected float32, float16 or bfloat16")


def check_threshold(op: str, name: str, value: float, meaning_of_0: str) -> None:
    """Check a magnitude that activations are compared with: 0, or one that is above 0 as a float32, too."""
    if not (value == 0 or value >= SMALLEST_THRESHOLD):
        check(False, op, f"{name}={value:g}; expected 0 ({meaning_of_0}) or at least 2**-126 (1.2e-38)")


def check_outlier_policy(op: str, outlier_policy: str, *more: str) -> None:
    """Check a policy that every operator knows, or that this one knows as well."""
    known = ("column", "element", "none", "all", *more)
    expected = ", ".join(map(repr, known))
    check(outlier_policy in known, op, f"outlier_policy={outlier_policy!r}; expected one of {expected}")


def check_weight(
    op: str, in_features: int, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Check an int8 weight [N, K], its scale [N] and a bias [N] against an activation of K features."""
    check(
        weight.dim() == 2 and weight.dtype == torch.int8,
        op,
        f"weight is {weight.dtype} {list(weight.shape)}; expected int8 [N, K] (quantize_weight makes one)",
    )
    n, k = weight.shape
    check(k == in_features, op, f"weight is {list(weight.shape)}, so it takes {k} features, but x has {in_features}")
    check(
        k <= MAX_IN_FEATURES,
        op,
        f"in_features={k} is more than {MAX_IN_FEATURES}, up to which int32 sums are exact: split the weight along K",
    )
    check(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == (n,),
        op,
        f"weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}; expected float32 [{n}]",
    )
    if bias is not None:
        check(tuple(bias.shape) == (n,), op, f"bias is {list(bias.shape)}; expected [{n}]")
