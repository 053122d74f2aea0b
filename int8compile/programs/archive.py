"""``save`` and ``load``: an exported program as one file, read without unpickling or running anything in it.

The file is PyTorch's own ``.pt2`` archive (a zip: the graph as JSON, each tensor as raw bytes), with one record more,
``extra/int8compile.json``:

    format_version      of this layout and of the operators' schemas; ``load`` reads only its own version
    int8compile, torch  the versions that wrote the file
    records             size and checksum of every other record, so that a missing, added or exchanged one is noticed
    config, report      the options and the report of ``export``, if it made the program
    example_inputs      shapes and dtypes, from which ``load`` makes zeros (``package`` needs example inputs)

``torch.export.load`` trusts a file: it unpickles what an archive holds as a pickle, looks up and runs what its JSON
names, and gives a tensor the size that its JSON says. So ``load`` looks at all of a file first: that every reader sees
the same records in it (``records``), that each is one that torch does not unpickle, that the JSON is such as ``save``
writes (``model_json``), and that each tensor's bytes are those of its dtype and sizes (``tensor_records``). ``save``
looks at what it has written in the same way, so what it has written loads.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx

import int8compile
import int8compile.ops  # registers the operators that programs call
from int8compile.config import Int8Config
from int8compile.errors import ExportError, ProgramFileError
from int8compile.files import written_whole
from int8compile.graph.capture import copied_graph
from int8compile.native import providers
from int8compile.programs import tensor_records
from int8compile.programs.archive_files import archive_file
from int8compile.programs.json_values import parse
from int8compile.programs.model_json import check_model, check_payload
from int8compile.programs.records import Records
from int8compile.programs.saved_inputs import described, zeros
from int8compile.torch_internals.files import drop_guards_of_equal_sizes, load_pt2

FORMAT_VERSION = 3

_KIND = "a file of int8compile.save"
_OURS = "extra/int8compile.json"
_MODEL = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}
_TENSORS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+")
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|"
    + "|".join(map(re.escape, (_OURS, _MODEL, _SAMPLE_INPUTS, *(a + b for a, b in _CONFIGS.items()))))
)
_one_at_a_time = threading.Lock()  # torch reads and writes programs by state that threads share
_FROM_EXPORT = ("config", "report")
_FIELDS = {"format_version", "int8compile", "torch", "records", "example_inputs", *_FROM_EXPORT}


def save(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write an exported program to a file ``NAME.pt2``, whole or not at all.

    Tied weights are written once; of storage that several tensors share, only what they use. Example inputs are left
    out but for their shapes, and so are stack traces, which name files of this machine.

    Args:
        program: of ``int8compile.export``, or any other whose tensors are plain ones.

    Raises:
        ExportError: not an ExportedProgram, a path that does not end in ``.pt2``, or a program that holds a tensor
            subclass or an object, which only a pickle could carry, takes inputs in a class that cannot be named, or
            calls what ``load`` would not read.
        OSError: the file cannot be written; one that was there is as it was.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise ExportError(f"save(program, path): program is {type(program).__name__}; expected an ExportedProgram")
    for name, value in {**program.state_dict, **program.constants}.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise ExportError(f"save(program, path): {name} is {type(value).__name__}; only plain tensors can be saved")
        if value.layout is not torch.strided or value.is_meta:
            kind = "on the meta device" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise ExportError(f"save(program, path): {name} is {kind}; only dense tensors with values can be saved")
    about = {
        "format_version": FORMAT_VERSION,
        "int8compile": int8compile.__version__,
        "torch": torch.__version__,
        **{
            key: value for key, value in program.graph_module.meta.get("int8compile", {}).items() if key in _FROM_EXPORT
        },
        "example_inputs": described(program),
    }
    with written_whole("save(program, path)", path) as whole:
        try:
            with _one_at_a_time, warnings.catch_warnings(), archive_file(whole, "save(program, path)") as file:
                # Of tensors with strides of their own. That they come back as they are is looked at below.
                warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
                torch.export.save(_bare(program), file)
        except NotImplementedError as error:
            raise ExportError(
                "save(program, path): program takes or returns a class without a name for files; export the model with "
                f"tuples and dicts instead, or register one for it: {error}"
            ) from error
        try:
            _describe_records(whole, about)
        except ProgramFileError as error:
            raise ExportError(f"save(program, path): load could not read the program back: {error}") from error


def load(
    path: str | os.PathLike[str], kernels: str = "auto", *, operators: Collection[str] = ()
) -> torch.export.ExportedProgram:
    """Read a program that ``save`` wrote. Nothing in the file is unpickled or run, and all of it is checked.

    What the program computes when it is called is not: it may take any time and memory, but calls nothing that reads
    files or runs commands, as far as PyTorch's operators do not.

    Args:
        kernels: who computes the operators in this process, as in ``Int8Config``.
        operators: of which libraries beside PyTorch and int8compile the program may call operators, by their namespaces
            (``["torchvision"]``). Import the library first, and name it only if you trust the file with what it can do.

    Raises:
        ProgramFileError: the file was not written by ``save``, is damaged, is of another format, holds something that
            would have to be unpickled or run, or refers to classes or operators that are unknown here.
        FileNotFoundError: there is no such file.
        KernelBuildError: ``kernels="native"``, and there are none.
    """
    kernels = Int8Config(kernels=kernels).kernels
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ProgramFileError(f"{name} is a folder; expected {_KIND}")
    if not os.path.exists(name):
        raise FileNotFoundError(f"load(path): there is no file {name!r}")
    with open(name, "rb") as file:  # once: what is checked is what is read
        records = Records(file, name, _KIND)
        about = _about(records)
        _check(records, operators)
        records.check_bytes()
        file.seek(0)
        try:
            # Of torch.export.load the part that reads; what it tries next is a format that unpickles.
            with _one_at_a_time:
                program: torch.export.ExportedProgram = load_pt2(file).exported_programs["model"]
            program.example_inputs = zeros(about.get("example_inputs"), program)
        except Exception as error:
            raise ProgramFileError(
                f"{name}, written by int8compile {about['int8compile']} with torch {about['torch']}, cannot be read "
                f"with torch {torch.__version__}: {error}\nIf this names a class or an operator, import the library "
                "that it belongs to first."
            ) from error
    providers.choose_provider(kernels, list(program.state_dict.values()))
    program.graph_module.meta["int8compile"] = {key: about[key] for key in _FROM_EXPORT if key in about}
    return program


def _about(records: Records) -> dict[str, Any]:
    """What the file says about itself and of its records, if that is so."""
    name = records.path
    if _OURS not in records:
        raise ProgramFileError(f"{name} was not written by int8compile.save: {_what_else(records.names())}")
    about = _json(records, _OURS, strict=False)
    version = about.get("format_version")
    if type(version) is not int or version < 1:
        raise records.damaged(f"{_OURS} has format version {version!r}; expected a number from 1 to {FORMAT_VERSION}")
    if version != FORMAT_VERSION:
        way_out = "install a newer one" if version > FORMAT_VERSION else "export the model again"
        raise ProgramFileError(
            f"{name} has format version {version}, written by int8compile {about.get('int8compile')}; this is "
            f"int8compile {int8compile.__version__}, which reads version {FORMAT_VERSION}: {way_out}"
        )
    unknown = about.keys() - _FIELDS
    texts = all(type(about.get(key)) is str for key in ("int8compile", "torch"))
    objects = all(type(about.get(key, {})) is dict for key in _FROM_EXPORT)
    if unknown or not texts or not objects:
        raise records.damaged(f"{_OURS} is not as int8compile.save writes it")
    written = {key: [records[key].size, records[key].crc] for key in records.names() if key != _OURS}
    if about.get("records") != written:
        raise records.damaged("its records are not those that were written")
    return about


def _check(records: Records, operators: Collection[str] | None) -> None:
    """Raise ProgramFileError unless torch can be given the file."""
    name = records.path
    for record in records.names():
        if not _KNOWN.fullmatch(record) and not _TENSORS.fullmatch(record):
            raise ProgramFileError(f"{name} holds {record!r}, which int8compile.save does not write; it is not read")
    configs = {folder: _json(records, folder + config) for folder, config in _CONFIGS.items()}
    pickled = [_SAMPLE_INPUTS] if records.read(_SAMPLE_INPUTS) else []
    pickled += [key for config in configs.values() for key in _pickled(config.get("config"))]
    if pickled:
        raise ProgramFileError(
            f"{name} holds pickled data ({', '.join(pickled)}), which may run any code; it is not read"
        )
    if records.read("byteorder").decode("ascii", "replace") != sys.byteorder:
        raise ProgramFileError(f"{name} was written on a machine of another byte order")
    model = _json(records, _MODEL)
    tensors: dict[str, Any] = {}
    used: set[str] = set()
    try:
        check_model(model, operators)
        for folder, config in configs.items():
            check_payload(config)
            used |= tensor_records.check(config["config"], folder, records)
            tensors = {**config["config"], **tensors}  # of one name, torch takes the weight
        tensor_records.check_inputs(model["graph_module"], tensors)
    except ProgramFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProgramFileError(f"{name} holds what int8compile.save does not write; it is not read: {error}") from error
    unused = [record for record in records.names() if _TENSORS.fullmatch(record) and record not in used]
    if unused:
        raise records.damaged(f"nothing says what {unused[0]} is")


def _pickled(config: object) -> list[str]:
    """The tensors that are not said to be plain bytes."""
    entries = config.items() if isinstance(config, dict) else ()
    return [key for key, entry in entries if isinstance(entry, dict) and entry.get("use_pickle") is not False]


def _json(records: Records, record: str, *, strict: bool = True) -> dict[str, Any]:
    try:
        value = parse(records.read(record), strict=strict)
    except ProgramFileError:
        raise
    except ValueError as error:
        raise records.damaged(f"{record} cannot be read ({_first(error)})") from error
    if not isinstance(value, dict):
        raise records.damaged(f"{record} holds no JSON object")
    return value


def _what_else(records: Collection[str]) -> str:
    """The way out for a file of another kind."""
    if any(record.startswith("data/aotinductor/") for record in records):
        return "it is an AOTInductor package; int8compile.load_package runs it"
    if _MODEL in records:
        return "it is a program of torch.export.save; `import int8compile.ops` and torch.export.load read it"
    return "it is some other archive of PyTorch's, such as a checkpoint"


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]


def _describe_records(path: Path, about: dict[str, Any]) -> None:
    """Add our record to an archive, if it is one that ``load`` would read."""
    with path.open("rb") as file:
        records = Records(file, path.name, _KIND)
        _check(records, None)
    written = {name: [records[name].size, records[name].crc] for name in records.names()}
    with zipfile.ZipFile(path, "a") as archive:  # with no time of day, so that a program gives the same bytes again
        archive.writestr(
            zipfile.ZipInfo(f"{records.root}/{_OURS}"), json.dumps({**about, "records": written}, default=str)
        )


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without example inputs and stack traces; its tensors are the same ones, as far as they fill their
    memory."""
    root = _without_traces(program.graph_module)
    tensors = tensor_records.without_gaps({**program.constants, **program.state_dict})
    bare = torch.export.ExportedProgram(
        root=root,
        graph=root.graph,
        graph_signature=program.graph_signature,
        state_dict={name: tensors[name] for name in program.state_dict},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants={name: tensors[name] for name in program.constants},
        verifiers=program.verifiers,
    )
    drop_guards_of_equal_sizes(bare)
    return bare


def _without_traces(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy, of the graphs of branches and the like in it too."""
    graph, _ = copied_graph(gm.graph)
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, child in copy.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, _without_traces(child))
    return copy
