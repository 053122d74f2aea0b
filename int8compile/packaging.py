"""``package`` and ``load_package``: an exported program compiled ahead of time, to run without Python.

AOTInductor makes a ``.pt2`` package of it: machine code and weights in one file. Our operators are in it as calls by
name (``kernels="auto"`` or ``"native"``), which the library that ``int8compile build`` makes answers; which
instruction set its kernels use is chosen where they run. With ``kernels="reference"`` the operators' reference bodies
are compiled into the package, which then needs nothing but libtorch, and is slower.
"""

from __future__ import annotations

import json
import os
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

import int8compile
import int8compile.ops  # registers the operators that packages call
from int8compile import inductor, native
from int8compile.config import Int8Config
from int8compile.errors import ExportError, OptionValueError, ProgramFileError


def package(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    config: object = None,
    *,
    portable: bool = False,
) -> Path:
    """Compile an exported program into an AOTInductor package.

    Shapes that are dynamic in the program stay so. In Python ``load_package`` runs it; ``examples/cpp`` is a program
    in C++ that does.

    Args:
        program: of ``int8compile.export`` or ``int8compile.load``; left as it is.
        path: of the package, ending in ``.pt2``.
        config: options: ``kernels`` (see above), ``mode`` and ``inductor`` count here.
        portable: compile what inductor generates for any x86-64 CPU with AVX2 instead of for this one. Our own kernels
            are chosen at run time either way. Needs a torch newer than 2.11.

    Returns:
        the path.

    Raises:
        ExportError: not an ExportedProgram, one without example inputs, or a path that does not end in ``.pt2``.
        OptionNameError, OptionValueError: bad options, or ``portable`` where it cannot be had.
        KernelBuildError: ``kernels="native"``, and there are none.
    """
    options = Int8Config.make(config)
    if not isinstance(program, torch.export.ExportedProgram):
        raise ExportError(f"package(program, path): program is {type(program).__name__}; expected an ExportedProgram")
    target = Path(path)
    if target.suffix != ".pt2":
        raise ExportError(f"package(program, path): path is {str(path)!r}; expected one that ends in '.pt2'")
    if program.example_inputs is None:
        raise ExportError(
            "package(program, path): program has no example inputs, which AOTInductor needs; set "
            "program.example_inputs = (args, kwargs)"
        )
    if portable and not (inductor.can_compile_for_other_cpus() and platform.machine() in ("x86_64", "AMD64")):
        raise OptionValueError(
            "portable",
            True,
            f"False on {platform.machine()} with torch {torch.__version__}, which compiles for this CPU",
        )
    is_native = options.kernels != "reference"
    native.choose_provider(
        options.kernels, list(program.state_dict.values())
    )  # for its error, if "native" cannot be had
    metadata = {"int8compile": json.dumps({"int8compile": int8compile.__version__, "calls_operators": is_native})}
    with torch.no_grad():
        inductor.compile_package(program, str(target), options, native=is_native, portable=portable, metadata=metadata)
    return target


def load_package(path: str | os.PathLike[str], kernels: str = "auto") -> Any:
    """A package's model: call it as the model that was exported.

    Args:
        kernels: who computes the operators that the package calls, as in ``Int8Config``.

    Raises:
        ProgramFileError: not a whole AOTInductor package.
        FileNotFoundError: there is no such file.
        KernelBuildError: ``kernels="native"``, and there are none.
    """
    name = os.fspath(path)
    kernels = Int8Config(kernels=kernels).kernels
    if not os.path.exists(name):
        raise FileNotFoundError(f"load_package(path): there is no file {name!r}")
    try:
        with zipfile.ZipFile(name) as archive:
            records = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ProgramFileError(f"{name} is truncated, or no package at all ({error})") from error
    if not any("data/aotinductor/" in record for record in records):
        raise ProgramFileError(f"{name} holds no AOTInductor package; int8compile.package makes them")
    native.choose_provider(kernels, [torch.empty(0)])
    return inductor.load_package(name)
