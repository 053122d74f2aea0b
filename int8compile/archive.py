"""``save`` and ``load``: an exported program as one file, read without unpickling anything.

The file is PyTorch's own ``.pt2`` archive (a zip: the graph as JSON, each tensor as raw bytes), with one record more,
``extra/int8compile.json``:

    format_version    of this layout; ``load`` takes its own and older ones
    int8compile, torch    the versions that wrote it
    config, report    what ``export`` was told and what it did, as far as the program comes from there
    example_inputs    shapes and dtypes, from which ``load`` makes zeros (``package`` needs example inputs)

``torch.export.load`` unpickles whatever such an archive holds as a pickle. So ``load`` first looks at each record, by
the reader that torch will use, and takes only those that torch does not unpickle. ``save`` writes no other.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from typing import Any

import torch
from torch.utils import _pytree as pytree

import int8compile
import int8compile.ops  # registers the operators that programs call
from int8compile import native
from int8compile.capture import copied_graph
from int8compile.config import Int8Config
from int8compile.errors import ExportError, ProgramFileError
from int8compile.whole_files import written_whole

FORMAT_VERSION = 1

_OURS = "extra/int8compile.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|"
    r"data/weights/weight_\d+|data/constants/tensor_\d+|" + "|".join(map(re.escape, (_OURS, _SAMPLE_INPUTS, *_CONFIGS)))
)
_DTYPE_NAMES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


def save(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write an exported program to a file ``NAME.pt2``, whole or not at all.

    Weights tied to one another are written once. Example inputs are left out but for their shapes, and so are stack
    traces, which name files of this machine.

    Args:
        program: of ``int8compile.export``, or any other whose tensors are plain ones.

    Raises:
        ExportError: not an ExportedProgram, a path that does not end in ``.pt2``, or a program that holds a tensor
            subclass or an object, which only a pickle could carry, or takes inputs in a class that cannot be named.
        OSError: the file cannot be written; one that was there is as it was.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise ExportError(f"save(program, path): program is {type(program).__name__}; expected an ExportedProgram")
    for name, value in {**program.state_dict, **program.constants}.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise ExportError(f"save(program, path): {name} is {type(value).__name__}; only plain tensors can be saved")
    about = {
        "format_version": FORMAT_VERSION,
        "int8compile": int8compile.__version__,
        "torch": torch.__version__,
        **program.graph_module.meta.get("int8compile", {}),
        "example_inputs": _describe(program),
    }
    with written_whole("save(program, path)", path) as whole:
        extra = {_OURS.removeprefix("extra/"): json.dumps(about, default=str)}
        try:
            torch.export.save(_bare(program), str(whole), extra_files=extra)
        except NotImplementedError as error:
            raise ExportError(
                "save(program, path): program takes or returns a class without a name for files; export the model with "
                f"tuples and dicts instead, or register one for it: {error}"
            ) from error


def load(path: str | os.PathLike[str], kernels: str = "auto") -> torch.export.ExportedProgram:
    """Read a program that ``save`` wrote. Nothing in the file is unpickled.

    Args:
        kernels: who computes the operators in this process, as in ``Int8Config``.

    Raises:
        ProgramFileError: the file was not written by ``save``, is damaged, is of a newer format, holds a record that
            would have to be unpickled, or refers to classes or operators that are unknown here.
        FileNotFoundError: there is no such file.
        KernelBuildError: ``kernels="native"``, and there are none.
    """
    kernels = Int8Config(kernels=kernels).kernels
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"load(path): there is no file {name!r}")
    about = _check(name)
    _check_bytes(name)
    try:
        program: torch.export.ExportedProgram = torch.export.load(name)
    except Exception as error:
        raise ProgramFileError(
            f"{name}, written by int8compile {about.get('int8compile')} with torch {about.get('torch')}, cannot be "
            f"read with torch {torch.__version__}: {error}\nIf this names a class or an operator, import the library "
            "that it belongs to first."
        ) from error
    native.choose_provider(kernels, list(program.state_dict.values()))
    program.example_inputs = _zeros(about.get("example_inputs"), program)
    program.graph_module.meta["int8compile"] = {key: about[key] for key in ("config", "report") if key in about}
    return program


def _check(name: str) -> dict[str, Any]:
    """What the file says about itself, if nothing speaks against reading it."""
    try:
        reader = torch._C.PyTorchFileReader(name)
        records = list(reader.get_all_records())
    except RuntimeError as error:
        raise ProgramFileError(
            f"{name} is truncated, or not a file of int8compile.save at all ({_first(error)})"
        ) from error
    if _OURS not in records:
        raise ProgramFileError(f"{name} was not written by int8compile.save: {_what_else(records)}")
    about = _json(reader, name, _OURS)
    version = about.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ProgramFileError(
            f"{name} has format version {version}, written by int8compile {about.get('int8compile')}; this is "
            f"int8compile {int8compile.__version__}, which reads up to version {FORMAT_VERSION}: install a newer one"
        )
    for record in records:
        if not _KNOWN.fullmatch(record):
            raise ProgramFileError(f"{name} holds {record!r}, which int8compile.save does not write; it is not read")
    pickled = [_SAMPLE_INPUTS] if _SAMPLE_INPUTS in records and reader.get_record(_SAMPLE_INPUTS) else []
    for config in _CONFIGS:
        entries = _json(reader, name, config).get("config", {})
        pickled += [tensor for tensor, entry in entries.items() if entry.get("use_pickle") is not False]
    if pickled:
        raise ProgramFileError(
            f"{name} holds pickled data ({', '.join(pickled)}), which may run any code; it is not read"
        )
    return about


def _check_bytes(name: str) -> None:
    """Compare each record to its checksum, which torch does not: a flipped bit would be another weight."""
    try:
        with zipfile.ZipFile(name) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ProgramFileError(f"{name} is damaged ({_first(error)})") from error
    if damaged is not None:
        raise ProgramFileError(f"{name} is damaged: the bytes of {damaged} are not those that were written")


def _json(reader: Any, name: str, record: str) -> dict[str, Any]:
    try:
        value = json.loads(reader.get_record(record))
    except (RuntimeError, ValueError) as error:
        raise ProgramFileError(f"{name} is damaged: {record} cannot be read ({_first(error)})") from error
    if not isinstance(value, dict):
        raise ProgramFileError(f"{name} is damaged: {record} holds no JSON object")
    return value


def _what_else(records: list[str]) -> str:
    """The way out for a file of another kind."""
    if any(record.startswith("data/aotinductor/") for record in records):
        return "it is an AOTInductor package; int8compile.load_package runs it"
    if "models/model.json" in records:
        return "it is a program of torch.export.save; `import int8compile.ops` and torch.export.load read it"
    return "it is some other archive of PyTorch's, such as a checkpoint"


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without example inputs and stack traces; its tensors are the same ones."""
    graph, _ = copied_graph(program.graph)
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    return torch.export.ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _describe(program: torch.export.ExportedProgram) -> list[Any] | None:
    """Each example input as [dtype, shape, device] or the plain value it is; None if one is neither."""
    described: list[Any] = []
    for value in pytree.tree_leaves(program.example_inputs):
        if isinstance(value, torch.Tensor):
            described.append([str(value.dtype).removeprefix("torch."), list(value.shape), str(value.device)])
        elif value is None or isinstance(value, (bool, int, float, str)):
            described.append(value)
        else:
            return None
    return described if program.example_inputs is not None else None


def _zeros(described: Any, program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Example inputs as ``_describe`` saw them, all zeros."""
    if not isinstance(described, list):
        return None
    leaves = []
    for value in described:
        if isinstance(value, list):
            dtype, shape, device = value
            value = torch.zeros(shape, dtype=_DTYPE_NAMES[dtype], device=device)
        leaves.append(value)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return inputs
