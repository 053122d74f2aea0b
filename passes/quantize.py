"""quantize: decides for each linear whether it runs in int8, and records the Reason.

    aten.linear(x, w, b)           ->  int8compile.linear(x, w_int8, w_scale, b, threshold, outlier_policy)
    aten.linear(x, aten.t(w), b)   ->  the same; the int8 form is [N, K] in either case
    aten.linear(x, w, b)           ->  int8compile.linear(x, w_int8, w_scale, b, 0, "all"), if weights alone are int8
    aten.linear(x, w, b)           ->  int8compile.master_linear(x, w, b, ...), if weights are to train

``w_int8`` and ``w_scale`` are lifted inputs, or rows of such where ``w`` is rows of a parameter. What stays float
keeps its node, and its Site says for which Reason. So does a call of ``int8compile.linear`` that was in the user's
graph: an ``Int8Linear``, which holds int8 weights itself.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from int8compile import selection
from int8compile.graph.capture import FloatInput, constant_of, stored_tensor
from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.ops import linear as int8_linear
from int8compile.ops import master_linear
from int8compile.passes.analysis import Effects, regions, transformed
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.effects import storage_of
from int8compile.passes.analysis.experts import Experts, routers
from int8compile.passes.analysis.linears import is_vector, resolve_transposes
from int8compile.passes.analysis.shards import Shards, match_shards
from int8compile.passes.analysis.sites import make_site, prequantized_site
from int8compile.passes.analysis.slices import rows_of_constant
from int8compile.passes.context import PassContext
from int8compile.passes.normalize import LINEAR
from int8compile.passes.shards import read_shards_first, replace_by_shards
from int8compile.report import Reason, Site
from int8compile.torch_internals.dtensors import local_of
from int8compile.torch_internals.tensors import is_any_fake, storage_key

_EMBEDDINGS = {torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default}


def quantize(graph: fx.Graph, context: PassContext) -> int:
    read_shards_first(graph, context)
    facts = Facts(graph, context)
    for target in (int8_linear, master_linear):
        for node in graph.find_nodes(op="call_function", target=target):
            context.sites[node] = prequantized_site(node)
    changes = 0
    left = transformed(graph)
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        if node in left:
            continue
        site = context.sites[node] = facts.decide(node)
        if not site.rewritten:
            continue
        changes += 1
        x, weight, bias = node.args
        config = context.config
        if config.llm_int8_has_fp16_weight:
            trained = (x, weight, bias, config.llm_int8_threshold, config.outlier_policy)
            context.replace(node, context.call(node, master_linear, trained, like=node, value=meta_value(node)))
            continue
        treated = facts.treatment(node, site)
        weight, weight_scale, *columns = _lifted(weight, treated.columns, node, context)
        outliers = treated.threshold, treated.outlier_policy
        shards = facts.shards(node, site.path)
        if shards is None:
            args = (x, weight, weight_scale, bias, *outliers, *columns)
            context.replace(node, context.call(node, int8_linear, args, like=node, value=meta_value(node)))
        else:
            replace_by_shards(node, shards, (weight, weight_scale), outliers, context)
    return changes


def _lifted(weight: fx.Node, columns: tuple[int, ...], before: fx.Node, context: PassContext) -> tuple[fx.Node, ...]:
    """The int8 form of a weight and its scales, and the columns and what is in them, if there are any."""
    rows = rows_of_constant(weight)
    if rows is None:
        root, transposed = resolve_transposes(weight)
        constant = constant_of(root)
        assert constant is not None
        return context.capture.lift((FloatInput(constant, transposed),), columns).inputs
    lifted = context.capture.lift((FloatInput(rows.root, transposed=False),))
    return rows.of(lifted.weight, before, context), rows.of(lifted.weight_scale, before, context)


class Facts:
    """What deciding about a linear, or about experts, needs to know about the whole graph."""

    def __init__(self, graph: fx.Graph, context: PassContext) -> None:
        self.context = context
        self.config = context.config
        self.regions = regions(graph, context.grad_enabled)
        self.effects = Effects(graph)
        embeddings = [n for n in graph.nodes if n.op == "call_function" and n.target in _EMBEDDINGS]
        tables = [arguments(node).get("weight") for node in embeddings]
        self.embeddings = {self._storage(t) for t in tables if isinstance(t, fx.Node)}
        self.embeddings |= {self._real_storage(t) for t in tables if isinstance(t, fx.Node)}
        self.embeddings.discard(None)
        self.routers = routers(graph, graph.find_nodes(op="call_function", target=LINEAR))

    def decide(self, node: fx.Node) -> Site:
        """Where a linear stands, and whether it is to be rewritten."""
        x, weight, _ = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        rows = rows_of_constant(weight)
        root = rows.root if rows else resolve_transposes(weight)[0]
        site = make_site(node, weight, Reason.REWRITTEN)
        reason, detail = self._reason(node, x, weight, root, site, self._form_refusal(node, root))
        if reason is Reason.REWRITTEN:
            detail = ", ".join(filter(None, (site.detail, self.treatment(node, site).note)))
        return dataclasses.replace(site, reason=reason, detail=detail or site.detail)

    def treatment(self, node: fx.Node, site: Site) -> selection.Treatment:
        """What becomes of its outliers."""
        config = self.config
        if not self._may_be_calibrated(node, site):
            return selection.Treatment(*selection.outliers(config, site.path)).noted(config)
        return selection.treatment(config, site.in_features, site.out_features, self._paths(node, site))

    def _may_be_calibrated(self, node: fx.Node, site: Site) -> bool:
        """Whether a calibration can know it: no experts, no rows of a parameter, no shard of a linear."""
        weight = node.args[1]
        return (
            site.experts is None
            and node.target is LINEAR
            and isinstance(weight, fx.Node)
            and rows_of_constant(weight) is None
            and self.shards(node, site.path) is None
        )

    @staticmethod
    def _paths(node: fx.Node, site: Site) -> list[str]:
        """The names a linear goes by: where it stands, and, where weights are tied, where its weight does."""
        root = resolve_transposes(node.args[1])[0] if isinstance(node.args[1], fx.Node) else None
        name = str(root.meta.get("int8compile_constant", "")) if root is not None else ""
        return [path for path in dict.fromkeys((site.path, name.removesuffix(".weight"))) if path]

    def decide_experts(self, node: fx.Node, experts: Experts) -> Site:
        """The same of a product with experts' weights."""
        site = make_site(node, experts.weight, Reason.REWRITTEN, transposed=experts.transposed)
        form = self._experts_refusal(node, experts)
        reason, detail = self._reason(node, experts.x, experts.weight, experts.weight, site, form)
        if reason is Reason.REWRITTEN:
            detail = self.treatment(node, site).note
        return dataclasses.replace(site, reason=reason, detail=detail)

    def _reason(
        self, node: fx.Node, x: fx.Node, used: fx.Node, root: fx.Node, site: Site, form: tuple[Reason, str] | None
    ) -> tuple[Reason, str]:
        """Why a product stays in float, or that it does not: x times ``used``, which is ``root`` or a view of it."""
        constant = constant_of(root)
        if constant is None:
            return (Reason.FROZEN if root.op == "get_attr" else Reason.NOT_CONSTANT), ""
        weight, activation, out = stored_tensor(constant), meta_tensor(x), meta_tensor(node)
        example, used_value = self.context.capture.examples.get(constant), meta_tensor(used)
        if weight is None:
            return Reason.SHAPE, ""
        if activation is None or out is None:
            return Reason.DTYPE, ""
        shards = self.shards(node, site.path)
        if shards is not None:
            used_value, activation = weight, local_of(activation)
        held = local_of(example) if isinstance(example, torch.Tensor) else None
        for value, what in ((held, ""), (used_value, ""), (activation, "activation: ")):
            if value is not None and not is_any_fake(value) and type(value) not in selection.PLAIN_TENSORS:
                return Reason.SUBCLASS, f"{what}{type(value).__name__}"
        if 0 in weight.shape and held is not example:
            return Reason.SHAPE, "an empty shard"
        shared = self._shares_an_embedding(root)
        trainable = example.requires_grad if isinstance(example, torch.Tensor) else weight.requires_grad
        trainable = trainable and self.regions[node][1] and not self.config.llm_int8_has_fp16_weight
        return (
            selection.shape_refusal(tuple(weight.shape)[site.experts is not None :], site.in_features)
            or next(filter(None, (selection.dtype_refusal(t.dtype) for t in (weight, activation, out))), None)
            or selection.name_refusal(site.path, shared, self.config)
            or ((Reason.MUTATED, "") if self.effects.ever_written(root) else None)
            or form
            or selection.size_refusal(site.in_features, site.out_features, self.config)
            or self._calibration_refusal(node, site)
            or ((Reason.TRAINABLE, "") if trainable else None)
            or ((Reason.SHARDED, shards.refusal) if shards is not None and shards.refusal else None)
            or ((Reason.SHARDED, "gradients") if shards is not None and self._needs_gradients(node) else None)
            or (Reason.REWRITTEN, "")
        )

    def shards(self, node: fx.Node, path: str) -> Shards | None:
        """Whether a linear is one of DTensors, which each process can compute from its own shards."""
        if node.target is not LINEAR:
            return None
        threshold, outlier_policy = selection.outliers(self.config, path)
        return match_shards(node, rows=threshold == 0 or outlier_policy != "column")

    def _needs_gradients(self, node: fx.Node) -> bool:
        operands = [meta_tensor(n) for n in node.all_input_nodes]
        return self.regions[node][1] and any(value is not None and value.requires_grad for value in operands)

    def _calibration_refusal(self, node: fx.Node, site: Site) -> tuple[Reason, str] | None:
        if not self._may_be_calibrated(node, site):
            return None
        return selection.calibration_refusal(self.config, site.in_features, site.out_features, self._paths(node, site))

    def _form_refusal(self, node: fx.Node, root: fx.Node) -> tuple[Reason, str] | None:
        """Why this call of a linear cannot be one of our operator, whatever its weight is."""
        x, weight, bias = node.args
        given = [a for a in (x, weight, root, bias, node) if isinstance(a, fx.Node)]
        if any(map(self.effects.reshaped, given)):
            return Reason.RESHAPED, ""
        value, out = meta_tensor(bias) if isinstance(bias, fx.Node) else None, meta_tensor(node)
        if isinstance(bias, fx.Node) and not (out is not None and is_vector(bias, out.shape[-1])):
            return Reason.FORM, f"bias {list(value.shape) if value is not None else '?'}"
        if node in self.routers:
            return Reason.ROUTER, ""
        return None if node.users else (Reason.UNREAD, "")

    def _experts_refusal(self, node: fx.Node, experts: Experts) -> tuple[Reason, str] | None:
        """The same of a product with experts' weights."""
        read = [experts.x, experts.weight, experts.offsets, *(experts.gather or ())]
        if any(map(self.effects.reshaped, [node, *node.all_input_nodes, *(n for n in read if n is not None)])):
            return Reason.RESHAPED, ""
        if experts.beside or self.config.llm_int8_has_fp16_weight:
            return Reason.EXPERTS, experts.beside or "llm_int8_has_fp16_weight"
        tensors = [meta_tensor(n) for n in (experts.weight, *(experts.gather or ())[1:])]
        if len({t.device for t in tensors if t is not None}) > 1:  # ids may be on the CPU, whatever they index
            return Reason.EXPERTS, "ids on another device"
        if experts.gather is not None and self.effects.changes(experts.gather.node, experts.gather.node, node):
            return Reason.MUTATED, "after gathering"
        return None if node.users else (Reason.UNREAD, "")

    def _shares_an_embedding(self, weight: fx.Node) -> bool:
        return self._storage(weight) in self.embeddings or self._real_storage(weight) in self.embeddings

    @staticmethod
    def _storage(node: fx.Node) -> int | None:
        value = meta_tensor(node)
        return None if value is None else storage_of(value)

    def _real_storage(self, node: fx.Node) -> int | None:
        """Two Parameters can share storage without being one graph input."""
        example = self.context.capture.examples.get(constant_of(node) or node)
        if not isinstance(example, torch.Tensor) or is_any_fake(example):
            return None
        return storage_key(example)
