"""``package`` and ``load_package``: compile an exported program ahead of time, to run without Python.

AOTInductor makes a ``.pt2`` package: machine code and weights in one file. With ``kernels="auto"`` or ``"native"`` it
calls int8compile's operators by name, which are in the library that ``int8compile build`` makes; the instruction set of
the kernels is chosen on the machine that runs them. With ``kernels="reference"`` the operators' reference bodies are
compiled into the package, which then needs nothing but libtorch, and is slower. The code that inductor generates is
compiled for one ``CpuTarget``.

Beside torch's own metadata a package carries ``int8compile``, a JSON object: ``int8compile`` and ``torch``, the
versions that made it; ``calls_operators``; ``machine``, ``cpu_isa`` and ``cpu_flags``, what its code needs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import int8compile
import int8compile.ops  # registers the operators that packages call
from int8compile import handoff
from int8compile.config import Int8Config
from int8compile.errors import ExportError, ProgramFileError
from int8compile.files import written_whole
from int8compile.native import providers
from int8compile.programs.archive_files import archive_file
from int8compile.programs.cpu_targets import cpu_flags, cpu_target, vector_bits
from int8compile.programs.records import Records
from int8compile.torch_internals import aot

_OURS = "int8compile"


def package(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    config: object = None,
    *,
    cpu_isa: str | None = None,
) -> Path:
    """Compile an exported program into an AOTInductor package.

    Shapes that are dynamic in the program stay so. In Python ``load_package`` runs it; ``examples/cpp`` is a program
    in C++ that does.

    Args:
        program: of ``int8compile.export`` or ``int8compile.load``; left as it is.
        path: of the package, ending in ``.pt2``.
        config: options: ``kernels`` (see above), ``mode`` and ``inductor`` count here.
        cpu_isa: the CPUs that what inductor generates is compiled for: ``"avx2"``, any of x86-64 with AVX2, which is
            the default there; ``"portable"``, any of x86-64; ``"native"``, this very CPU and those that have all it
            has, the default elsewhere. (Our own kernels are chosen where they run in any case.)

    Returns:
        the path.

    Raises:
        ExportError: not an ExportedProgram, one without example inputs, or a path that does not end in ``.pt2``.
        OptionNameError, OptionValueError: bad options.
        KernelBuildError: ``kernels="native"``, and there are none.
        OSError: the file cannot be written; one that was there is as it was.
    """
    options = Int8Config.make(config)
    if not isinstance(program, torch.export.ExportedProgram):
        raise ExportError(f"package(program, path): program is {type(program).__name__}; expected an ExportedProgram")
    if program.example_inputs is None:
        raise ExportError(
            "package(program, path): program has no example inputs, which AOTInductor needs; set "
            "program.example_inputs = (args, kwargs)"
        )
    target = cpu_target(cpu_isa)
    is_native = options.kernels != "reference"
    # for its error, if "native" cannot be had
    providers.choose_provider(options.kernels, list(program.state_dict.values()))
    about = {
        "int8compile": int8compile.__version__,
        "torch": torch.__version__,
        "calls_operators": is_native,
        "machine": platform.machine(),
        "cpu_isa": target.name,
        "cpu_flags": target.flags,
    }
    metadata = {_OURS: json.dumps(about)}
    call = "package(program, path)"
    with torch.no_grad(), written_whole(call, path) as whole, archive_file(whole, call) as file:
        handoff.compile_package(
            program,
            file,
            options,
            native=is_native,
            metadata=metadata,
            march=target.march,
            vector_bits=target.vector_bits,
        )
    return Path(path)


def load_package(path: str | os.PathLike[str], kernels: str = "auto") -> Any:
    """A package's model: call it as the model that was exported.

    Args:
        kernels: who computes the operators that the package calls, as in ``Int8Config``.

    Raises:
        ProgramFileError: a folder, not a whole AOTInductor package, one for another kind of machine, for a CPU that has
            what this one lacks, or for a GPU where there is none, or one that this torch cannot load.
        FileNotFoundError: there is no such file.
        KernelBuildError: ``kernels="native"``, and there are none.
    """
    name = os.fspath(path)
    kernels = Int8Config(kernels=kernels).kernels
    if os.path.isdir(name):
        raise ProgramFileError(f"{name} is a folder; expected a package, which is one file")
    if not os.path.exists(name):
        raise FileNotFoundError(f"load_package(path): there is no file {name!r}")
    _check_file(name)
    metadata, about = _metadata(name)
    device = metadata.get("AOTI_DEVICE_KEY", "cpu")
    _check_machine(name, about, device)
    if about.get("calls_operators", True):
        providers.choose_provider(kernels, [torch.empty(0, device=device)])
    try:
        return aot.load_package(name, vector_bits(about.get("cpu_isa")))
    except (RuntimeError, ValueError, OSError) as error:
        made = f"made with torch {about['torch']}, " if "torch" in about else ""
        raise ProgramFileError(f"{name}, {made}cannot be loaded with torch {torch.__version__}: {error}") from error


def _check_file(name: str) -> None:
    """Raise ProgramFileError unless a file is a package, and whole: machine code is not run on the chance that it is.

    A package is code, so one that is forged does what it likes; only load what you would run.
    """
    with open(name, "rb") as file:
        records = Records(file, name, "a package")
        if not any(record.startswith("data/aotinductor/") for record in records.names()):
            other = "; it is a program, which int8compile.load reads" if "models/model.json" in records else ""
            raise ProgramFileError(f"{name} holds no AOTInductor package; int8compile.package makes them{other}")
        records.check_bytes()


def _metadata(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What is written in a package, and of that what is ours."""
    try:
        metadata = aot.package_metadata(name)
        about = json.loads(metadata.get(_OURS, "{}"))
    except (RuntimeError, ValueError, RecursionError) as error:
        raise ProgramFileError(f"{name} is damaged: what it says of itself cannot be read ({error})") from error
    kinds = {"torch": str, "machine": str, "cpu_isa": str, "calls_operators": bool, "cpu_flags": list}
    fits = isinstance(about, dict) and all(isinstance(about.get(key, kind()), kind) for key, kind in kinds.items())
    if not fits or not all(isinstance(flag, str) for flag in about.get("cpu_flags", [])):
        raise ProgramFileError(f"{name} is damaged: what it says of itself is not as int8compile.package writes it")
    return metadata, about


def _check_machine(name: str, about: Mapping[str, Any], device: str) -> None:
    """Machine code that a machine does not know ends the process; say so before."""
    machine = about.get("machine", platform.machine())
    if machine != platform.machine():
        raise ProgramFileError(f"{name} was made for {machine}, and this is {platform.machine()}; package it here")
    here = cpu_flags()
    missing = [flag for flag in about.get("cpu_flags", ()) if flag not in here]
    if missing:
        raise ProgramFileError(
            f"{name} was made with cpu_isa={about.get('cpu_isa')!r} and needs what this CPU lacks: "
            f"{', '.join(missing)}; package the program with cpu_isa='avx2' or 'portable'"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ProgramFileError(f"{name} was made for a GPU, and torch sees none here; package a program on the CPU")
