"""quantize: decide, linear by linear, and say why.

    aten.linear(x, w, b)           ->  int8compile.linear(x, w_int8, w_scale, b, threshold, policy)
    aten.linear(x, aten.t(w), b)   ->  the same; the int8 form is [N, K] in either case

``w_int8`` and ``w_scale`` are lifted inputs. What stays float keeps its node, and its Site says for which Reason.
"""

from __future__ import annotations

import fnmatch

import torch
from torch import fx

from int8compile.capture import is_constant, site_path
from int8compile.config import Int8Config
from int8compile.graph_text import meta_tensor, meta_value
from int8compile.ops import linear as int8_linear
from int8compile.ops._library import FLOAT_DTYPES, MAX_IN_FEATURES
from int8compile.passes.context import PassContext
from int8compile.passes.effects import regions, storage_of, written_storages
from int8compile.passes.normalize import LINEAR, resolve_transposes
from int8compile.report import Reason, Site

#: names of output embeddings in transformers' models; weights tied to an embedding are found by sharing
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")

_EMBEDDINGS = {torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default}
_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


def quantize(graph: fx.Graph, context: PassContext) -> int:
    facts = _Facts(graph, context)
    changes = 0
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        site = context.sites[node] = facts.decide(node)
        if not site.rewritten:
            continue
        x, weight, bias = node.args
        lifted = context.capture.lift((resolve_transposes(weight),))
        config = context.config
        args = (x, lifted.weight, lifted.scale, bias, config.llm_int8_threshold, config.outlier_policy)
        new = context.call(node, int8_linear, args, like=node, value=meta_value(node))
        context.replace(node, new)
        _erase_dead_transpose(graph, weight)
        changes += 1
    return changes


def _erase_dead_transpose(graph: fx.Graph, weight: fx.Node) -> None:
    if weight.op == "call_function" and not weight.users:
        graph.erase_node(weight)


class _Facts:
    """What ``decide`` needs to know about the whole graph."""

    def __init__(self, graph: fx.Graph, context: PassContext) -> None:
        self.context = context
        self.config = context.config
        self.regions = regions(graph, context.grad_enabled)
        self.written = written_storages(graph)
        tables = [
            n.args[1] if len(n.args) > 1 else n.kwargs.get("weight") for n in graph.nodes if n.target in _EMBEDDINGS
        ]
        self.embeddings = {storage_of(t) for t in tables if isinstance(t, fx.Node)}
        self.embeddings |= {self._real_storage(t) for t in tables if isinstance(t, fx.Node)}
        self.embeddings.discard(None)

    def decide(self, node: fx.Node) -> Site:
        """Where a linear stands, and whether it is to be rewritten."""
        x, weight, _ = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        root, transposed = resolve_transposes(weight)
        value, out = meta_tensor(root), meta_tensor(node)
        shape = tuple(value.shape) if value is not None else ()
        n, k = (shape[::-1] if transposed else shape) if len(shape) == 2 else (0, shape[0] if shape else 0)
        path = site_path(node, root)
        reason, detail = self._reason(node, x, root, path, int(k), int(n))
        dtype = str(out.dtype).removeprefix("torch.") if out is not None else "?"
        return Site(path, int(k), int(n), dtype, reason, detail)

    def _reason(self, node: fx.Node, x: fx.Node, root: fx.Node, path: str, k: int, n: int) -> tuple[Reason, str]:
        if not is_constant(root):
            return Reason.NOT_CONSTANT, ""
        weight, activation, out = meta_tensor(root), meta_tensor(x), meta_tensor(node)
        example = self.context.capture.examples.get(root)
        if isinstance(example, torch.Tensor) and type(example) not in _PLAIN and not _is_fake(example):
            return Reason.SUBCLASS, type(example).__name__
        if weight is None or weight.dim() != 2 or k > MAX_IN_FEATURES:
            return Reason.SHAPE, f"{list(weight.shape) if weight is not None else ''}"
        for tensor in (weight, activation, out):
            if tensor is None or tensor.dtype not in FLOAT_DTYPES:
                return Reason.DTYPE, "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        if self.config.skip_output_embeddings and self._is_output_embedding(root, path):
            return Reason.OUTPUT_EMBEDDING, ""
        pattern = skipped_by(path, self.config)
        if pattern is not None:
            return Reason.SKIPPED, pattern
        if storage_of(root) in self.written:
            return Reason.MUTATED, ""
        if min(k, n) < self.config.min_features:
            return Reason.TOO_SMALL, f"min_features={self.config.min_features}"
        trainable = example.requires_grad if isinstance(example, torch.Tensor) else weight.requires_grad
        if trainable and self.regions[node][1]:
            return Reason.TRAINABLE, ""
        return Reason.REWRITTEN, ""

    def _is_output_embedding(self, weight: fx.Node, path: str) -> bool:
        shared = storage_of(weight) in self.embeddings or self._real_storage(weight) in self.embeddings
        return shared or path.rsplit(".", 1)[-1] in OUTPUT_EMBEDDINGS

    def _real_storage(self, node: fx.Node) -> int | None:
        """Two Parameters can share storage without being one graph input."""
        example = self.context.capture.examples.get(node)
        if not isinstance(example, torch.Tensor) or _is_fake(example):
            return None
        return int(example.untyped_storage()._cdata)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def skipped_by(path: str, config: Int8Config) -> str | None:
    """The pattern of ``llm_int8_skip_modules`` that names this module or one above it, or None."""
    return next((pattern for pattern in config.llm_int8_skip_modules if names(pattern, path)), None)


def names(pattern: str, path: str) -> bool:
    """Whether a pattern (a path, a dotted suffix of one, or a shell pattern) names a module or one above it."""
    parts = path.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(a == pattern or a.endswith(f".{pattern}") or fnmatch.fnmatchcase(a, pattern) for a in above)
