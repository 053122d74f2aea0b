"""Sites and weights of a rewritten graph for the report: every linear once, and the weights' bytes."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree

from int8compile import selection
from int8compile.graph.capture import Capture, constant_of, is_constant, site_path, stored_tensor
from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.ops import grouped_linear, master_linear
from int8compile.ops import linear as int8_linear
from int8compile.passes.analysis import transformed
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.effects import graph_behind
from int8compile.passes.analysis.experts import match_experts
from int8compile.passes.analysis.fused import FUSED
from int8compile.passes.analysis.linears import match_linear, resolve_transposes
from int8compile.passes.analysis.slices import rows_of_constant
from int8compile.passes.context import PassContext
from int8compile.report import Reason, Site, WeightUse
from int8compile.torch_internals.dtensors import is_dtensor, local_of


def make_site(node: fx.Node, weight: fx.Node, reason: Reason, detail: str = "", *, transposed: bool = False) -> Site:
    """The site of a linear. Of a DTensor's shard it has the sizes of the whole, as in a single process.

    Args:
        node: what computes it; the site's dtype is that of its (first) result.
        weight: what it multiplies by, [N, K], or [K, N] if ``transposed``, of experts with E in front: a parameter, or
            any view of one.
    """
    rows, (root, swapped) = rows_of_constant(weight), resolve_transposes(weight)
    constant = rows.root if rows else constant_of(root)
    value = meta_tensor(weight)
    shape = () if value is None else tuple(value.shape)
    whole = meta_tensor(constant) if constant is not None and rows is None else None
    if value is not None and whole is not None and is_dtensor(whole):
        shard = local_of(value).shape[-2:]
        detail = ", ".join(
            filter(None, (detail, "shard " + " x ".join(map(str, shard if transposed else shard[::-1]))))
        )
        shape = tuple(whole.shape[::-1] if swapped else whole.shape)
    experts, shape = (int(shape[0]), shape[1:]) if len(shape) == 3 else (None, shape)
    shape = shape[::-1] if transposed else shape
    n, k = shape if len(shape) == 2 else (0, shape[0] if shape else 0)
    results = [leaf for leaf in pytree.tree_leaves(meta_value(node)) if isinstance(leaf, torch.Tensor)]
    dtype = str(results[0].dtype).removeprefix("torch.") if results else "?"
    path = site_path(node, constant)
    detail = detail or (f"rows {rows.start}:{rows.stop}" if rows else "")
    return Site(path, int(k), int(n), dtype, reason, detail, experts)


def prequantized_site(node: fx.Node) -> Site:
    """The site of an ``int8compile.linear``, or one of its siblings, that the user's model calls itself."""
    given = arguments(node)
    detail = "16-bit weight" if node.target is master_linear else selection.detail(given["outlier_policy"])
    return make_site(node, given["weight"], Reason.PREQUANTIZED, detail)


def complete_sites(graph: fx.Graph, context: PassContext) -> list[Site]:
    """The sites in graph order, those too that no pass looked at (a disabled pass, a nested graph, a fused call)."""
    sites = []
    # A product that merge made stands for several sites, which are at the parts of its result.
    lifted = {pair.weight for pair in context.capture.lifted.values()}
    inside = transformed(graph)
    for node in graph.nodes:
        if node in context.sites:
            sites.append(context.sites[node])
        elif (body := graph_behind(node)) is not None:
            sites += [site for n in body.graph.nodes if (site := _float_site(n, Reason.NESTED))]
        elif site := _float_site(node, Reason.NESTED if node in inside else Reason.DISABLED):
            sites.append(site)
        elif node.op == "call_function" and node.target in (int8_linear, grouped_linear, master_linear):
            if arguments(node)["weight"] not in lifted:
                sites.append(prequantized_site(node))
        elif node.op == "call_function" and node.target in FUSED:
            sites += _fused_sites(node, context)
    return sites


def _float_site(node: fx.Node, reason: Reason) -> Site | None:
    """The site of a linear, or of experts, that stays as it is; None for any other node."""
    linear = match_linear(node) or match_experts(node)
    return None if linear is None else make_site(node, linear.weight, reason, transposed=linear.transposed)


def _fused_sites(node: fx.Node, context: PassContext) -> list[Site]:
    """A site for each weight that a fused call multiplies by: its matrices that are parameters (a mask is none)."""
    examples = context.capture.examples
    parameters = [n for n in node.all_input_nodes if is_constant(n) and isinstance(examples[n], torch.nn.Parameter)]
    values = [(weight, meta_tensor(weight)) for weight in parameters]
    return [make_site(node, weight, Reason.FUSED) for weight, value in values if value is not None and value.dim() == 2]


def weight_uses(captured: Capture) -> list[WeightUse]:
    """Bytes of every parameter and buffer the graph reads or read."""
    forms: dict[fx.Node, dict[bool, int]] = {}
    for lifted in captured.lifted.values():
        for node, transposed in lifted.sources:
            value = stored_tensor(node)
            assert value is not None
            features = value.shape[-2 if transposed else -1]
            forms.setdefault(node, {})[transposed] = value.numel() + 4 * (value.numel() // max(1, features))
    kept = set(captured.kept)
    uses = []
    for node, example in captured.examples.items():
        if is_constant(node) and isinstance(example, torch.Tensor):
            size = local_of(example).numel() * example.element_size()
            uses.append(WeightUse(id(example), size, sum(forms.get(node, {}).values()), node in kept))
    return uses
