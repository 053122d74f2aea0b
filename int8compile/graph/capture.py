"""A copy of a graph for the passes to rewrite: which inputs are constant, and int8 weights as new inputs.

Dynamo reads its own graph again while it makes guards, so that graph must not be changed, and passes work on a copy. A
parameter is an ordinary input of the copy, marked by ``meta["int8compile_constant"]``. A rewritten site reads its int8
weight and scale from *lifted* inputs, which come after Dynamo's; a ``LiftedWeight`` records which weights fill them at
each call. Storing the tensors in the graph instead would be wrong: two instances of one class share one graph.

In an exported program parameters are inputs too, so it uses the same ``Capture`` (``programs/exporting.py``). There the
lifted inputs come before the user's, as parameters do, and are filled once.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from int8compile.graph.dump import meta_tensor
from int8compile.torch_internals.dtensors import local_of, takes_shard
from int8compile.torch_internals.graphs import empty_like, is_of_fsdp, set_source, source_of


class FloatInput(NamedTuple):
    """A float weight among a graph's inputs: [N, K], or [K, N] if ``transposed``; of experts with E in front.

    A DTensor stands for this process's shard of it.
    """

    placeholder: fx.Node
    transposed: bool


@dataclasses.dataclass(frozen=True)
class LiftedWeight:
    """A lifted int8 weight: the float weights whose rows it holds, and the two inputs that carry it.

    Args:
        sources: the float weights, in the order of their rows.
        weight, weight_scale: placeholders of int8 [sum of N, K] and fp32 [sum of N]; of experts, which are a single
            source, [E, N, K] and [E, N].
        columns: features whose codes have 16 bits (policy "calibrated").
        column_inputs: placeholders of the columns, int32 [C], and of the int8 weight in them, [sum of N, C].
    """

    sources: tuple[FloatInput, ...]
    weight: fx.Node
    weight_scale: fx.Node
    columns: tuple[int, ...] = ()
    column_inputs: tuple[fx.Node, ...] = ()

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """All its placeholders, in their order among the graph's."""
        return (self.weight, self.weight_scale, *self.column_inputs)


class Capture:
    """A graph of our own, its lifted weights, and the example input and position of each of Dynamo's inputs."""

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], fake_mode: Any, lift_before: fx.Node | None = None
    ) -> None:
        """Take a graph whose placeholders correspond to ``example_inputs`` one by one, as it is (no copy).

        Args:
            lift_before: the placeholder that lifted inputs are put before; None puts them behind all others.
        """
        self.gm = gm
        self.lift_before = lift_before
        self.fake_mode = fake_mode
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self.examples = dict(zip(placeholders, example_inputs, strict=True))
        self.position = {node: i for i, node in enumerate(placeholders)}
        #: storages of the inputs' fakes, one read and one written to, that passes took to be two
        self.apart: set[tuple[Any, Any]] = set()
        self.lifted: dict[tuple[tuple[FloatInput, ...], tuple[int, ...]], LiftedWeight] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def lift(self, sources: tuple[FloatInput, ...], columns: tuple[int, ...] = ()) -> LiftedWeight:
        """The lifted int8 form of these float weights, with the weight in some columns, made on first request."""
        if (sources, columns) in self.lifted:
            return self.lifted[sources, columns]
        shapes = [_int8_shape(source) for source in sources]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        first = stored_tensor(sources[0].placeholder)
        assert first is not None
        paths = "+".join(str(node.meta["int8compile_constant"]) for node, _ in sources)
        with self.fake_mode:
            codes = torch.empty(shape, dtype=torch.int8, device=first.device)
            weight_scale = torch.empty(shape[:-1], dtype=torch.float32, device=first.device)
        name = sources[0].placeholder.name
        lifted = LiftedWeight(
            sources,
            self._new_input(f"{name}_int8", f'int8 "{paths}"', codes),
            self._new_input(f"{name}_scale", f'scale "{paths}"', weight_scale),
            columns,
        )
        if columns:
            with self.fake_mode:
                numbers = torch.empty(len(columns), dtype=torch.int32, device=first.device)
                in_columns = torch.empty((shape[0], len(columns)), dtype=torch.int8, device=first.device)
            of = f'columns of "{paths}"'
            inputs = (
                self._new_input(f"{name}_columns", of, numbers),
                self._new_input(f"{name}_columns_int8", f"int8 {of}", in_columns),
            )
            lifted = dataclasses.replace(lifted, column_inputs=inputs)
        self.lifted[sources, columns] = lifted
        return lifted

    def drop_unused_inputs(self) -> None:
        """Remove float weights nothing reads any more, and lifted inputs a later pass replaced."""
        for key, lifted in list(self.lifted.items()):
            if not any(node.users for node in lifted.inputs):
                for node in lifted.inputs:
                    self.graph.erase_node(node)
                del self.lifted[key]
        in_int8 = {source.placeholder for lifted in self.lifted.values() for source in lifted.sources}
        for node in list(self.graph.find_nodes(op="placeholder")):
            if node in in_int8 and not node.users:
                self.graph.erase_node(node)

    @property
    def kept(self) -> list[fx.Node]:
        """Those of Dynamo's inputs that the graph still reads, in order; the lifted ones come after them."""
        return [node for node in self.graph.find_nodes(op="placeholder") if node in self.position]

    def _new_input(self, name: str, text: str, value: torch.Tensor) -> fx.Node:
        inputs = list(self.graph.find_nodes(op="placeholder"))
        before = self.lift_before
        with self.graph.inserting_after(inputs[-1]) if before is None else self.graph.inserting_before(before):
            node = self.graph.placeholder(name)
        node.target = node.name  # the name is made unique: a weight can be lifted plain, transposed and as part of one
        set_source(node, None)
        node.meta["val" if "val" in inputs[0].meta else "example_value"] = value
        # As Dynamo marks parameters: a static address, which CUDA graphs need not copy.
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node.meta["int8compile_input"] = text
        return node


def _int8_shape(source: FloatInput) -> tuple[int, ...]:
    """[N, K], or [E, N, K]: the shape of a float weight's int8 form."""
    value = stored_tensor(source.placeholder)
    assert value is not None
    shape = value.mT.shape if source.transposed else value.shape
    return tuple(map(int, shape))


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any], fake_mode: Any) -> Capture:
    """A ``Capture`` of a copy of Dynamo's graph."""
    graph, copied = copied_graph(gm.graph)
    ours = fx.GraphModule(gm, graph)
    # What Dynamo and AOTAutograd keep on the module and on placeholders beside node.meta.
    for name, value in gm.__dict__.items():
        ours.__dict__.setdefault(name, value)
    ours.meta = copy.copy(gm.meta)
    for theirs, node in copied.items():
        if theirs.op == "placeholder":
            source = source_of(theirs)
            set_source(node, source)
            mark_constant(node, source)
            node.meta["int8compile_of_fsdp"] = is_of_fsdp(source)
    return Capture(ours, example_inputs, fake_mode)


def copied_graph(original: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and the copy of each of its nodes but the output."""
    graph = empty_like(original)
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(original, copied))
    graph.output_node().meta.update(original.output_node().meta)
    for theirs, ours in copied.items():
        if ours.name != theirs.name:  # such as "input", which FX gives to no new node; signatures go by names
            ours.name = theirs.name
    return graph, copied


def mark_constant(node: fx.Node, source: object) -> None:
    """Note on a placeholder whether it is a parameter or buffer of the model, and its name there."""
    if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is None:
        return
    name = getattr(source, "name", "")
    mark_constant_as(node, module_path(str(name() if callable(name) else name)) or node.name)


def mark_constant_as(node: fx.Node, name: str) -> None:
    """Mark a placeholder as the parameter or buffer of this name."""
    node.meta["int8compile_constant"] = name
    node.meta["int8compile_input"] = f'weight "{name}"'


def is_constant(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the model."""
    return node.op == "placeholder" and "int8compile_constant" in node.meta


def constant_of(node: fx.Node) -> fx.Node | None:
    """The parameter or buffer that a value is, or that it is this process's shard of; None if it is neither."""
    source = node.args[0] if takes_shard(node) else node
    return source if isinstance(source, fx.Node) and is_constant(source) else None


def stored_tensor(node: fx.Node) -> torch.Tensor | None:
    """The fake of what this process holds of a constant: of a DTensor, its shard."""
    value = meta_tensor(node)
    return None if value is None else local_of(value)


def module_path(source: str) -> str:
    """``L['self']._modules['layers']._modules['0']._parameters['weight']`` -> ``layers.0.weight``."""
    # A class with a __getattr__ of its own, such as PEFT's wrappers, is reached into by its __dict__.
    source = re.sub(r"\.__dict__\['(_(?:modules|parameters|buffers))'\]", r".\1", source)
    path = re.sub(r"\.?_(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", source)
    path = re.sub(r"\['([^']*)'\]|\[(\d+)\]", lambda m: "." + (m[1] or m[2]), path)
    # What is left in front is how the frame reached the model: L.self, L.args.0, G.model ...
    return re.sub(r"^[LG]\.[^.]+\.?", "", path).strip(".")


def site_path(node: fx.Node, weight: fx.Node | None) -> str:
    """The module a linear belongs to, such as ``layers.0.fc``; with the parameter where the module has several."""
    name = str(weight.meta["int8compile_constant"]) if weight is not None and is_constant(weight) else ""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = module_path(str(stack[-1][0])) if stack else ""
    if not path:
        return name.removesuffix(".weight") or node.name
    # A tied weight bears the name of the module that Dynamo met first, so only names below the path refine it.
    refines = name.startswith(f"{path}.") and name != f"{path}.weight"
    return name.removesuffix(".weight") if refines else path
