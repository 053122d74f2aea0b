"""The memory that each node of a graph reads, writes and aliases. Dynamo's graphs are not functional at this point.

Passes move reads: of an activation to the first of the linears that share it, of a bias to a joined product, of a
weight to before the graph, where it is quantised. They may where nothing writes in between, and mostly ask two
questions:

    effects.changes(value, start, end)         does it change from the one node to the other?
    effects.readable_at(value, start, end)     may what ``end`` reads be read at ``start`` already?

Memory is a set of *tokens*. A token is the storage behind a fake tensor; or a node, for memory of its own that is not
known; or ANY, which may be any memory. The memory of

* a call is the storages of its value. If the value may be a view of an argument (they share a storage), the argument's
  memory is added. If the storages or the function called are not known, the node itself and the memory of all its
  arguments are added.
* an input is its storage, of a DTensor that of its shard, or ANY if that is not known (other tensor subclasses).

What a call writes is said, in this order, by

1. the schemas of the operators it may stand for (``torch.add``, ``x.add_``, an OpOverload, a packet, ``_foreach_*``,
   custom operators): arguments marked ``(a!)``, lists of them, and ``running_*``, which batch norms write unmarked;
2. for Python functions of torch's own, Python's operators and methods without an operator of their name: the schemas
   of the operators that are called when it runs on fake tensors (``F.embedding(max_norm=)``, ``x[0] = y``, ``x += y``);
3. for higher-order operators that do no more than call the graphs they are given: those graphs, by the same rules;
   for the calls that begin and end transforms of ``torch.func``, or give a DTensor another layout: nothing;
4. otherwise: it writes everything it is given. A module that is called may write anything.

It relies on truthful schemas (but for ``running_*``, and for names that end in ``_`` whose schema marks nothing), and
on fakes that share storage where tensors do; in graphs loaded from a file, every result that a schema marks as an alias
counts as one. Inputs that come to overlap only at a later call: see ``overlaps.py``, and ``LiftedInputs.fetch`` for
those that come to overlap a weight.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from int8compile.graph.dump import meta_value
from int8compile.passes.analysis.arguments import arguments, bind
from int8compile.torch_internals.dtensors import changes_layout, local_of, takes_shard
from int8compile.torch_internals.operators import is_higher_order, overloads_of, run_on_fakes
from int8compile.torch_internals.tensors import storage_key, wraps_tensors

#: memory that may be any other
ANY = "any"

#: a storage's identity; a node, for memory of its own that is not known; ANY
Token = int | fx.Node | str
Memory = frozenset[Token]

#: these call the graphs they are given, and do nothing else to their operands
_CALLERS = {
    "autograd_function_apply",
    "cond",
    "flex_attention",
    "invoke_subgraph",
    "map_impl",
    "scan",
    "tag_activation_checkpoint",
    "while_loop",
    "wrap",
}

_CALLS = ("call_function", "call_method", "call_module")


class Effects:
    """The effects in a graph as it is now. Passes that then insert calls that only read may go on asking.

    Args:
        graph: of Dynamo or torch.export, with fake values in its meta.
        apart: takes pairs of inputs' storages, one read and one written to, on whose being two an answer relied.
            What was asked need not have been done, so these are too many rather than too few.
    """

    def __init__(self, graph: fx.Graph, apart: set[tuple[Token, Token]] | None = None) -> None:
        self._apart = apart
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._tracked = _storages_are_tracked(graph)
        self._memory: dict[fx.Node, Memory] = {}
        self._own: dict[fx.Node, Memory | None] = {}
        self._writers: list[tuple[int, Memory]] = []
        self._reshaped: set[int | fx.Node] = set()
        self._note_reshaped(n for node in graph.nodes if _reshapes(node) for n in node.all_input_nodes[:1])
        for node in graph.nodes:
            self._own[node] = _own_storages(node)
            self._memory[node] = self._memory_of(node)
            written = self._written_by(node)
            if written:
                self._writers.append((self._order[node], written))
        self._inputs = frozenset[Token]().union(*(self._memory[n] for n in graph.find_nodes(op="placeholder")))

    def memory(self, node: fx.Node) -> Memory:
        """All the memory that a node's value may lie in."""
        return self._memory[node]

    def changes(self, value: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether anything from ``start`` (with it) to ``end`` (without it) may write to the memory of ``value``."""
        first, last = self._order[start], self._order[end]
        memory = self._memory[value]
        between = [written for i, written in self._writers if first <= i < last]
        if any(_overlap(memory, written) for written in between):
            return True
        if self._apart is not None:
            for written in between:
                self._apart.update(itertools.product(memory & self._inputs, written & self._inputs))
        return False

    def readable_at(self, value: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether just before ``start`` a value is there already, and is what ``end`` reads."""
        return self._order[value] < self._order[start] and not self.changes(value, start, end)

    def ever_written(self, value: fx.Node) -> bool:
        """Whether any node may write to the memory of ``value``."""
        return any(_overlap(self._memory[value], written) for _, written in self._writers)

    def writes(self, node: fx.Node) -> bool:
        """Whether a node writes to anything."""
        return any(i == self._order[node] for i, _ in self._writers)

    def reshaped(self, node: fx.Node) -> bool:
        """Whether a tensor's shape or memory is exchanged in place somewhere (``unsqueeze_``, ``t_``, ``set_``).

        Dynamo's fake of it then has the last of its shapes, at every node.
        """
        return node in self._reshaped or id(meta_value(node)) in self._reshaped

    def _memory_of(self, node: fx.Node) -> Memory:
        own = self._own[node]
        if node.op not in _CALLS:
            return frozenset({ANY}) if own is None else own
        given = [n for n in node.all_input_nodes if self._memory[n]]
        if own is None or is_higher_order(node) or node.op == "call_module" or _transforms(node) or not _is_known(node):
            return frozenset({node}).union(own or (), *(self._memory[n] for n in given))
        aliased = (n for n in given if self._may_be_view(node, own, n))
        return own.union(*(self._memory[n] for n in aliased))

    def _may_be_view(self, node: fx.Node, own: Memory, source: fx.Node) -> bool:
        theirs = self._own[source]
        if theirs is None or own & theirs or "dropout" in _name(node):
            return True  # (dropout without effect returns its argument itself, where its fake returns a copy)
        return not self._tracked and any(schema_aliases(o) for o in overloads_of(node.target))

    def _written_by(self, node: fx.Node) -> Memory:
        if node.op not in _CALLS:
            return frozenset()
        if node.op == "call_module":
            return frozenset({ANY})
        given = [n for n in node.all_input_nodes if self._memory[n]]
        if not given or _transforms(node) or changes_layout(node) or _only_looks_up(node):
            return frozenset()
        if is_higher_order(node):
            return frozenset() if _only_calls_pure_graphs(node) else self._all(given)
        arguments = _arguments_written(node)
        if arguments is not None:
            written = [n for n in _nodes_in([argument for argument, _ in arguments]) if self._memory[n]]
            self._note_reshaped(_nodes_in([argument for argument, reshapes in arguments if reshapes]))
            return self._all(written)
        return self._seen_to_write(node, given)

    def _seen_to_write(self, node: fx.Node, given: list[fx.Node]) -> Memory:
        """By running it; everything it is given if it cannot be run."""
        written: list[fx.Node] = []

        def look(overload: torch._ops.OpOverload, args: Any, kwargs: Any) -> None:
            arguments = _written_arguments(overload, args, kwargs)
            for argument, reshapes in [((args, kwargs), True)] if arguments is None else arguments:
                storages = _storages(argument)
                targets = [n for n in given if storages is None or (own := self._own[n]) is None or own & storages]
                written.extend(targets)
                self._note_reshaped(targets if reshapes else ())

        # (A fake whose shape has changed since does not fit what was called with it before.)
        if any(map(self.reshaped, given)) or not run_on_fakes(node, meta_value, look):
            self._note_reshaped(given)
            return self._all(given)
        return self._all(written)

    def _all(self, nodes: Iterable[fx.Node]) -> Memory:
        return frozenset().union(*(self._memory[n] for n in nodes))

    def _note_reshaped(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self._reshaped.add(node)
            self._reshaped.update(id(leaf) for leaf in pytree.tree_leaves(meta_value(node)))


def _reshapes(node: fx.Node) -> bool:
    """Whether a call may be of an operator that changes the shape of its first argument."""
    return node.op in _CALLS and any(torch.Tag.inplace_view in o.tags for o in overloads_of(node.target))


def _overlap(a: Memory, b: Memory) -> bool:
    return bool(a & b) or (ANY in a and bool(b)) or (ANY in b and bool(a))


def _own_storages(node: fx.Node) -> Memory | None:
    """The storages of a node's value; None where they are not known."""
    if graph_behind(node) is not None or node.op == "output":
        return frozenset()
    known = "example_value" in node.meta or "val" in node.meta
    return _storages(meta_value(node)) if known else None


def _storages(value: object) -> Memory | None:
    """The storages of all tensors in a value; None where one has none that can be told."""
    tokens: set[Token] = set()
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            storage = storage_of(leaf)
            if storage is None:
                return None
            tokens.add(storage)
    return frozenset(tokens)


def storage_of(tensor: torch.Tensor) -> int | None:
    """Identity of the storage behind a tensor, equal for views of one tensor; None where it says nothing.

    A subclass that wraps other tensors has a storage of its own, which is not where its values are. Those of a DTensor
    are in its shard.
    """
    tensor = local_of(tensor)
    plain = not wraps_tensors(tensor)
    try:
        return storage_key(tensor) if plain and tensor.layout is torch.strided else None
    except (NotImplementedError, RuntimeError):  # a tensor that torch.func's transforms wrap, a nested one
        return None


def _is_known(node: fx.Node) -> bool:
    """Whether a call's results lie where its fake's do: torch's own, not a function that someone allowed in graphs."""
    if node.op == "call_method" or overloads_of(node.target):  # type: ignore[arg-type]
        return True
    module = getattr(node.target, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "_operator", "builtins", "math")


def _name(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


def _transforms(node: fx.Node) -> bool:
    """Whether a call wraps or unwraps tensors for a transform of ``torch.func``."""
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and module.startswith(("torch._functorch.", "torch._C._functorch"))


def _only_looks_up(node: fx.Node) -> bool:
    """Whether a call is an embedding's that leaves its table as it is. (With DTensors it cannot be run to be seen.)"""
    given = arguments(node) if node.target is torch.nn.functional.embedding else {}
    return "max_norm" in given and given["max_norm"] is None


def schema_aliases(overload: torch._ops.OpOverload) -> bool:
    """Whether an operator may return a view of an argument."""
    return any(result.alias_info is not None for result in overload._schema.returns)


def _arguments_written(node: fx.Node) -> list[tuple[object, bool]] | None:
    """The arguments that a call writes to, by schemas, and whether their shape may change; None if none tells."""
    overloads: Iterable[torch._ops.OpOverload] = overloads_of(node.target)  # type: ignore[arg-type]
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_arguments(node.target, node.args, node.kwargs)
    overloads = [o for o in overloads if _may_be_called(o._schema, node.kwargs)]
    if overloads and all(_is_pure(o._schema) for o in overloads):
        return []
    found = [_written_arguments(overload, node.args, node.kwargs) for overload in overloads]
    taken = [arguments for arguments in found if arguments is not None]  # (the others do not take these arguments)
    return [argument for arguments in taken for argument in arguments] if taken else None


def _may_be_called(schema: Any, kwargs: Any) -> bool:
    """Whether these keyword arguments do not rule out an overload: it has an ``out`` where they do, and no others."""
    to_out = kwargs.get("out") is not None
    needed = [a.name for a in schema.arguments if a.kwarg_only and not a.has_default_value()]
    return all(name in kwargs for name in needed) and to_out is any(a.name == "out" for a in schema.arguments)


def _written_arguments(overload: torch._ops.OpOverload, args: Any, kwargs: Any) -> list[tuple[object, bool]] | None:
    """The same for one overload; None if it does not take these arguments, or its schema is not to be believed."""
    schema = overload._schema
    if _is_pure(schema):
        return []
    given = bind(schema, args, kwargs)
    if given is None:
        return None
    names = [a.name for a in schema.arguments if _is_written(a)]
    reshapes = torch.Tag.inplace_view in overload.tags
    return [(given[name], reshapes) for name in names if name in given] if names else None


def _is_pure(schema: Any) -> bool:
    """Whether an operator writes to nothing. A name like ``resize_`` whose schema marks nothing is not believed."""
    unmarked = schema.name.endswith("_") and not schema.name.endswith("__")
    return not unmarked and not any(map(_is_written, schema.arguments))


def _is_written(argument: Any) -> bool:
    marked = argument.alias_info is not None and argument.alias_info.is_write
    return bool(marked or argument.name.startswith("running_"))


def only_computes(node: fx.Node) -> bool:
    """Whether a call does nothing but give its value, so that it may go where nothing reads that.

    It writes to nothing, draws no random numbers and checks nothing. What is not known may do all of them.
    """
    if node.op not in ("call_function", "call_method"):
        return node.op == "get_attr"
    if node.target is operator.getitem or node.target is getattr or takes_shard(node):
        return True
    if is_higher_order(node) or node.is_impure():
        return False
    overloads = [o for o in overloads_of(node.target) if _may_be_called(o._schema, node.kwargs)]
    if overloads:
        return all(map(_gives_its_value_alone, overloads))
    called: list[torch._ops.OpOverload] = []
    ran = run_on_fakes(node, meta_value, lambda overload, args, kwargs: called.append(overload))
    return ran and bool(called) and all(map(_gives_its_value_alone, called))


def _gives_its_value_alone(overload: torch._ops.OpOverload) -> bool:
    schema = overload._schema
    return _is_pure(schema) and bool(schema.returns) and torch.Tag.nondeterministic_seeded not in overload.tags


def _only_calls_pure_graphs(node: fx.Node) -> bool:
    """Whether a higher-order operator is one that calls graphs, none of which writes to what it is given."""
    bodies = [body for argument in node.all_input_nodes if (body := graph_behind(argument)) is not None]
    return node.target.name() in _CALLERS and bool(bodies) and not any(map(_writes_outside, bodies))  # type: ignore[union-attr,operator]


def graph_behind(node: fx.Node) -> fx.GraphModule | None:
    """The graph that a ``get_attr`` node stands for, as an argument of a higher-order operator."""
    value: object = node.graph.owning_module
    for name in str(node.target).split(".") if node.op == "get_attr" else ():
        value = getattr(value, name, None)
    return value if node.op == "get_attr" and isinstance(value, fx.GraphModule) else None


def _writes_outside(body: fx.GraphModule) -> bool:
    effects = Effects(body.graph)
    return any(effects.ever_written(node) for node in body.graph.nodes if node.op in ("placeholder", "get_attr"))


def _storages_are_tracked(graph: fx.Graph) -> bool:
    """Whether values of this graph share storages where tensors do; in a program from a file each has its own."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _VIEWS and node.args and isinstance(node.args[0], fx.Node):
            ours, theirs = _storages(meta_value(node)), _storages(meta_value(node.args[0]))
            if ours is not None and theirs is not None and not ours & theirs:
                return False
    return True


_VIEWS = {
    op
    for packet in ("view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach")
    for op in overloads_of(getattr(torch.ops.aten, packet))
    if not op._schema.is_mutable
}


def _nodes_in(values: object) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, fx.Node)]
