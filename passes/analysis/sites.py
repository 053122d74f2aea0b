"""Sites and weights of a rewritten graph for the report: every linear once, and the weights' bytes."""

from __future__ import annotations

import torch
from torch import fx

from int8compile.graph.capture import Capture, is_constant
from int8compile.graph.dump import meta_tensor
from int8compile.ops import linear as int8_linear
from int8compile.ops import master_linear
from int8compile.passes.analysis import transformed
from int8compile.passes.context import PassContext
from int8compile.passes.expand import FUSED
from int8compile.passes.normalize import float_site, match_linear
from int8compile.passes.quantize import prequantized_site
from int8compile.report import Reason, Site, WeightUse


def complete_sites(graph: fx.Graph, context: PassContext) -> list[Site]:
    """The sites in graph order, those too that no pass looked at (a disabled pass, a nested graph, a fused call)."""
    sites = []
    # A product that merge made stands for several sites, which are at the parts of its result.
    lifted = {pair.weight for pair in context.capture.lifted.values()}
    inside = transformed(graph)
    for node in graph.nodes:
        if node in context.sites:
            sites.append(context.sites[node])
        elif node.op == "get_attr" and isinstance(
            body := _attribute(context.capture.gm, str(node.target)), fx.GraphModule
        ):
            sites += [float_site(n, Reason.NESTED) for n in body.graph.nodes if match_linear(n)]
        elif match_linear(node):
            sites.append(float_site(node, Reason.NESTED if node in inside else Reason.DISABLED))
        elif node.op == "call_function" and node.target in (int8_linear, master_linear) and node.args[1] not in lifted:
            sites.append(prequantized_site(node))
        elif node.op == "call_function" and node.target in FUSED:
            sites += _fused_sites(node, context)
    return sites


def _fused_sites(node: fx.Node, context: PassContext) -> list[Site]:
    """A site for each weight that a fused call multiplies by: its matrices that are parameters (a mask is none)."""
    sites = []
    for weight in filter(is_constant, node.all_input_nodes):
        value = meta_tensor(weight)
        if value is None or value.dim() != 2 or not isinstance(context.capture.examples[weight], torch.nn.Parameter):
            continue
        path = str(weight.meta["int8compile_constant"]).removesuffix(".weight")
        dtype = str(value.dtype).removeprefix("torch.")
        sites.append(Site(path, int(value.shape[1]), int(value.shape[0]), dtype, Reason.FUSED))
    return sites


def _attribute(gm: fx.GraphModule, target: str) -> object:
    value: object = gm
    for name in target.split("."):
        value = getattr(value, name, None)
    return value


def weight_uses(captured: Capture) -> list[WeightUse]:
    """Bytes of every parameter and buffer the graph reads or read."""
    forms: dict[fx.Node, dict[bool, int]] = {}
    for lifted in captured.lifted.values():
        for node, transposed in lifted.members:
            value = meta_tensor(node)
            assert value is not None
            forms.setdefault(node, {})[transposed] = value.numel() + 4 * value.shape[1 if transposed else 0]
    kept = set(captured.kept)
    uses = []
    for node, example in captured.examples.items():
        if is_constant(node) and isinstance(example, torch.Tensor):
            size = example.numel() * example.element_size()
            uses.append(WeightUse(id(example), size, sum(forms.get(node, {}).values()), node in kept))
    return uses
