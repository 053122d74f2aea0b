"""``export``: exports a model as a program in int8, by the same passes as ``torch.compile``.

An exported graph has the model's parameters and buffers as its first inputs, so it can be a ``Capture`` without
changes: its lifted inputs become buffers. A weight ``layers.0.fc.weight`` [N, K] is replaced in the program by

    layers.0.fc.weight_int8     int8 [N, K]
    layers.0.fc.weight_scale    float32 [N]

and, of a calibrated linear, by ``weight_columns`` int32 [C] and ``weight_columns_int8`` int8 [N, C] beside them
(whatever the parameter is called, ``_int8`` and so on are added to its name). Linears that became one product have
one pair, named for all of them: ``layers.0.attn.q_k_v.weight_int8`` holds the rows of ``q``, ``k`` and ``v``.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.export import ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from int8compile import session
from int8compile.backend import announce, rewrite_capture
from int8compile.config import Int8Config
from int8compile.errors import ExportError, OptionValueError
from int8compile.graph.capture import Capture, LiftedWeight, copied_graph, mark_constant_as
from int8compile.graph.dump import meta_value
from int8compile.native import providers
from int8compile.programs.training_mode import modules_in_training
from int8compile.report import GraphReport, Report
from int8compile.torch_internals.dynamo import fake_mode_of
from int8compile.torch_internals.modules import uncompiled
from int8compile.torch_internals.tensors import storage_key
from int8compile.weights.int8_weight import FloatWeight
from int8compile.weights.store import WeightStore

log = logging.getLogger(__name__)

#: told of each step: what it is, how much of it is done, of how much
Progress = Callable[[str, int, int | None], None]

#: what torch.export says -> what to do about it
_WAYS_OUT = {
    "not a known type": "the model returns an object that torch.export does not know; a transformers model returns no "
    "cache with kwargs={'use_cache': False}, and torch.export.register_dataclass makes a dataclass known",
    "0/1 specialized": "a dimension that dynamic_shapes makes dynamic has size 0 or 1 in args, which torch.export "
    "takes for its only size; take example inputs of size 2 or more there",
}

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_SUFFIXES = ("int8", "scale", "columns", "columns_int8")
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    config: object = None,
    *,
    progress: Progress | None = None,
) -> torch.export.ExportedProgram:
    """Export a model for inference with its linears in int8.

    The program holds int8 weights [N, K] and fp32 scales [N] as buffers named after the weights they replace, and none
    of the float weights that only rewritten linears read. What stays float is the model's own memory, without
    gradients. The model is left as it is. What was rewritten, and what was not and why, is in
    ``int8compile.last_report()``.

    Outputs of a class of their own come out of the program as a dict of the same keys (transformers' ``ModelOutput``, a
    dataclass that ``torch.export.register_dataclass`` knows) or as a tuple (a named one), so that it runs where that
    class is unknown.

    Args:
        model: a module, exported by ``torch.export.export`` without gradients as it stands (call ``eval()`` first), or
            an ``ExportedProgram``, decomposed or not, which is left as it is too.
        args, kwargs, dynamic_shapes: as for ``torch.export.export``; not with an ``ExportedProgram``.
        config: options, as a dict, an ``Int8Config`` or a ``BitsAndBytesConfig``. The program does not depend on
            ``kernels``, which says what runs it here; ``mode`` and ``inductor`` are for ``int8compile.package``.
        progress: called as ``progress(step, done, total)`` when something has been done; total is None while that
            cannot be counted.

    Raises:
        ExportError: the model is neither a module nor an exported program, or args are not a tuple.
        OptionNameError, OptionValueError: bad options.
        KernelBuildError: ``kernels="native"``, and there are none.
        Exception: whatever ``torch.export.export`` raises on a model it cannot export.
    """
    options = Int8Config.make(config)
    if options.release_weights:
        raise OptionValueError(
            "release_weights", True, "False (an exported program keeps no float weights; the model stays as it is)"
        )
    tell = progress or (lambda step, done, total: None)
    tell("trace the model", 0, None)
    program = _exported(model, args, kwargs, dynamic_shapes)
    tell("trace the model", 1, 1)
    captured, duplicates = _capture(program)
    # The operators stay calls; this is who computes them where the program runs as it is, in this process.
    provider = providers.choose_provider(options.kernels, list(program.state_dict.values()))
    report = rewrite_capture(captured, options, provider, grad_enabled=False)
    rewritten = _assemble(program, captured, duplicates, tell)
    rewritten.graph_module.meta["int8compile"] = _provenance(options, report)
    session.record(report, weakref.ref(rewritten))  # a report of its own, whatever was done to the model before
    announce(report)
    return rewritten


def _exported(model: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise ExportError(
                "export(model, args, kwargs, dynamic_shapes): model is an ExportedProgram, which has its inputs and "
                "shapes already; leave args, kwargs and dynamic_shapes out"
            )
        return model
    if not isinstance(model, torch.nn.Module):
        raise ExportError(
            f"export(model, ...): model is {type(model).__name__}; expected a torch.nn.Module or an ExportedProgram"
        )
    if not isinstance(args, tuple):
        raise ExportError(f"export(model, args): args is {type(args).__name__}; expected a tuple, such as (x,)")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ExportError(
                f"export(model, ...): {name} is on the meta device, without values; load the weights first"
            )
    original = uncompiled(model)
    training = modules_in_training(original)
    if training:
        more = f" and {len(training) - 5} more" if len(training) > 5 else ""
        log.warning(
            "int8: export: the model is in training mode, and so is the program: %s%s compute something else than "
            "after eval(), such as dropout that drops; call eval() first",
            ", ".join(name or f"the {type(original).__name__} itself" for name in training[:5]),
            more,
        )
    try:
        with torch.no_grad():
            return torch.export.export(original, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except (RuntimeError, ValueError) as error:
        way_out = next((text for sign, text in _WAYS_OUT.items() if sign in str(error)), None)
        if way_out is None:
            raise
        raise ExportError(f"export(model, ...): {way_out}\n{error}") from error


def _capture(program: torch.export.ExportedProgram) -> tuple[Capture, dict[fx.Node, list[fx.Node]]]:
    """A capture of a copy of the graph, and for each tied weight the other inputs that are the same tensor."""
    graph, _ = copied_graph(program.graph)
    gm = fx.GraphModule(program.graph_module, graph)
    gm.meta = dict(program.graph_module.meta)
    inputs = list(graph.find_nodes(op="placeholder"))
    mutated = {spec.target for spec in program.graph_signature.output_specs if spec.kind in _MUTATIONS}
    examples: list[Any] = []
    first_of: dict[object, fx.Node] = {}
    duplicates: dict[fx.Node, list[fx.Node]] = {}
    user: fx.Node | None = None
    for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
        value = _value(program, spec) if spec.kind in _WEIGHTS else meta_value(node)
        examples.append(value)
        if spec.kind is InputKind.USER_INPUT:
            user = user or node
        if spec.kind not in _WEIGHTS or spec.target in mutated or not isinstance(value, torch.Tensor):
            continue
        mark_constant_as(node, str(spec.target))
        first = first_of.setdefault(_identity(value), node)
        if first is not node:
            node.replace_all_uses_with(first)
            duplicates.setdefault(first, []).append(node)
    return Capture(gm, examples, fake_mode_of(map(meta_value, gm.graph.nodes)), lift_before=user), duplicates


def _value(program: torch.export.ExportedProgram, spec: InputSpec) -> Any:
    target = str(spec.target)
    return program.state_dict[target] if target in program.state_dict else program.constants[target]


def _identity(value: torch.Tensor) -> object:
    """Equal for tensors that are one and the same memory, seen the same way: tied weights."""
    if value.layout is not torch.strided or value.numel() == 0:
        return id(value)
    return storage_key(value), value.storage_offset(), value.shape, value.stride(), value.dtype


def _assemble(
    program: torch.export.ExportedProgram,
    captured: Capture,
    duplicates: Mapping[fx.Node, list[fx.Node]],
    tell: Progress,
) -> torch.export.ExportedProgram:
    """The rewritten graph as a program: its signature, its int8 buffers, and what is left of its float weights."""
    graph = captured.graph
    for node, same in duplicates.items():
        for other in same if node not in captured.kept else ():
            graph.erase_node(other)
    kept = set(captured.kept)
    specs = dict(zip(captured.examples, program.graph_signature.input_specs, strict=True))
    gone = {spec.target for node, spec in specs.items() if node not in kept}
    state = {name: _frozen(value) for name, value in program.state_dict.items() if name not in gone}
    for done, (lifted, name, inputs) in enumerate(_int8_weights(captured, state), 1):
        tell("quantise weights", done, len(captured.lifted))
        for node, suffix, value in zip(lifted.inputs, _SUFFIXES, inputs, strict=False):
            target = f"{name}_{suffix}"
            state[target] = value
            specs[node] = InputSpec(InputKind.BUFFER, TensorArgument(node.name), target, persistent=True)
    return torch.export.ExportedProgram(
        root=captured.gm,
        graph=graph,
        graph_signature=type(program.graph_signature)(
            input_specs=[specs[node] for node in graph.find_nodes(op="placeholder")],
            output_specs=_output_specs(program, graph),
        ),
        state_dict=state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=_call_graph(program),
        example_inputs=program.example_inputs,
        constants={name: value for name, value in program.constants.items() if name not in gone},
        verifiers=program.verifiers,
    )


def _frozen(value: torch.Tensor) -> torch.Tensor:
    """The same memory, of which no gradients are recorded; the model's own parameter may go on to want some."""
    return torch.nn.Parameter(value.detach(), requires_grad=False) if isinstance(value, torch.nn.Parameter) else value


def _int8_weights(
    captured: Capture, taken: Mapping[str, object]
) -> Iterator[tuple[LiftedWeight, str, tuple[torch.Tensor, ...]]]:
    """Each lifted weight with the name of its buffers and their values."""
    store = WeightStore()
    for lifted in captured.lifted.values():
        sources = [FloatWeight(captured.examples[node], transposed) for node, transposed in lifted.sources]
        yield lifted, _buffer_name(lifted, taken), store.entry(sources).inputs(lifted.columns)


def _output_specs(program: torch.export.ExportedProgram, graph: fx.Graph) -> list[OutputSpec]:
    """The program's, by the new names of what it returns."""
    specs = []
    outputs = cast(tuple[Any, ...], graph.output_node().args[0])
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
        if isinstance(node, fx.Node):
            spec = dataclasses.replace(spec, arg=dataclasses.replace(cast(Any, spec.arg), name=node.name))
        specs.append(spec)
    return specs


def _call_graph(program: torch.export.ExportedProgram) -> list[ModuleCallEntry]:
    """How the program is called; signatures of submodules name nodes that may be gone, so they are left out."""
    root, *rest = program.module_call_graph
    signature = cast(Any, root.signature)
    whole = dataclasses.replace(root, signature=dataclasses.replace(signature, out_spec=_portable(signature.out_spec)))
    return [whole, *(dataclasses.replace(entry, signature=None) for entry in rest)]


def _buffer_name(lifted: LiftedWeight, taken: Collection[str]) -> str:
    """Where a lifted weight's buffers go, without ``_int8`` and so on, which make it a name of its own."""
    name = unique = joined_path([str(node.meta["int8compile_constant"]) for node, _ in lifted.sources])
    number = 2
    while any(f"{unique}_{suffix}" in taken for suffix in _SUFFIXES):
        unique, number = f"{name}_{number}", number + 1
    return unique


def joined_path(paths: list[str]) -> str:
    """``a.q.weight``, ``a.k.weight`` -> ``a.q_k.weight``: what differs is joined, what is common stays around it."""
    split = [path.split(".") for path in paths]
    shortest = min(map(len, split))
    front = next((i for i in range(shortest) if len({parts[i] for parts in split}) > 1), shortest - 1)
    rest = shortest - front - 1
    back = next((i for i in range(rest) if len({parts[-1 - i] for parts in split}) > 1), rest)
    middle = "_".join(dict.fromkeys("_".join(parts[front : len(parts) - back]) for parts in split))
    return ".".join([*split[0][:front], middle, *split[0][len(split[0]) - back :]])


def _portable(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """An output structure without classes that another process may not know.

    Mappings of any kind and dataclasses become dicts, named tuples (torch's own, such as ``max`` returns, among them)
    become tuples.
    """
    if spec.is_leaf():
        return spec
    children = [_portable(child) for child in spec.children()]
    kind: Any = spec.type  # the function of that name for any namedtuple
    if isinstance(kind, type) and issubclass(kind, dict) and kind is not dict:
        keys = list(spec.context[1] if kind.__name__ == "defaultdict" else spec.context)
        return pytree.TreeSpec(dict, keys, children)
    if dataclasses.is_dataclass(kind):
        return pytree.TreeSpec(dict, list(spec.context[0]), children)
    if kind is collections.namedtuple or (isinstance(kind, type) and issubclass(kind, tuple)):
        return pytree.TreeSpec(tuple, None, children)
    return pytree.TreeSpec(spec.type, spec.context, children)


def _provenance(config: Int8Config, report: GraphReport) -> dict[str, Any]:
    """What ``save`` writes beside the program."""
    return {"config": config.to_dict(), "report": Report([report]).to_dict()}
