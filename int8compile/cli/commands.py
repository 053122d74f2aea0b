"""The commands of ``int8compile``.

Exit codes of every command: 0 done, 1 not done (the reason is on stderr), 2 wrong usage, and as in shells 130 after
Ctrl-C and 143 after SIGTERM, neither of which leaves a half-written program.
With ``--json``, stdout is one JSON document and nothing else.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import DownloadColumn

from int8compile.cli.output import err, failures_to_stderr, out, print_json, progress_bars
from int8compile.errors import Int8CompileError
from int8compile.files import check_target

app = typer.Typer(
    help="LLM.int8() as a torch.compile backend: model = torch.compile(model, backend='int8')",
    epilog="Exit codes: 0 done; 1 it could not be done, the reason is on stderr; 2 wrong usage; 130 and "
    "143 stopped by Ctrl-C and SIGTERM. With --json, stdout is one JSON document and nothing else.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Model = Annotated[
    str, typer.Argument(help="A transformers folder or hub name, or module:function that returns (model, args).")
]
Threshold = Annotated[float, typer.Option(help="llm_int8_threshold")]
Skip = Annotated[list[str] | None, typer.Option(help="llm_int8_skip_modules; can be repeated.")]
WeightOnly = Annotated[list[str] | None, typer.Option(help="llm_int8_weight_only_modules; can be repeated.")]
Activation = Annotated[str, typer.Option(help="int8, or float, which leaves all activations as they are")]
MinFeatures = Annotated[int, typer.Option(help="Smaller linears stay in float.")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="A file that `int8compile calibrate` wrote, or its folder.")
]
Kernels = Annotated[str, typer.Option(help="auto, native or reference")]


@app.callback()
def _root() -> None:
    """So that a command's name is needed while there are few of them."""


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is there, what was chosen, where builds are kept, and what is missing.

    Builds nothing. Exits with 1 if something keeps native kernels from being used.

    Example: int8compile doctor --json
    """
    from int8compile.cli.diagnosis import print_diagnosis
    from int8compile.native.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
    else:
        print_diagnosis(found)
    raise typer.Exit(1 if found["problems"] else 0)


@app.command()
def build(as_json: AsJson = False) -> None:
    """Compile the native kernels now, so that the first compiled model does not wait: for container images.

    Keeps them in INT8COMPILE_CACHE_DIR, or else in the user's cache folder. What is built already is left as it is.

    Example: INT8COMPILE_CACHE_DIR=/opt/int8compile int8compile build
    """
    from int8compile.native import loader, providers

    built: dict[str, Any] = {}
    for name in providers.wanted():
        start = time.perf_counter()
        with failures_to_stderr():
            path = loader.build(name, keep=True)
            loader.load(name)
        built[name] = {"path": str(path), "seconds": round(time.perf_counter() - start, 3)}
        if not as_json:
            out.print(f"{name}: {path} ({built[name]['seconds']:.1f} s)", highlight=False)
    if as_json:
        print_json(built)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a float transformers checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to make, or one that an interrupted run left.")],
    format: Annotated[
        str, typer.Option(help="int8compile, bitsandbytes, or compressed-tensors (for vLLM and SGLang).")
    ] = "int8compile",
    threshold: Threshold = 6.0,
    skip: Skip = None,
    weight_only: WeightOnly = None,
    activation: Activation = "int8",
    min_features: MinFeatures = 128,
    calibration: CalibrationFile = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare both models' outputs afterwards.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an int8 copy of a checkpoint, file by file, without ever holding the model.

    Can be stopped at any time: an unfinished folder does not load, and the same command goes on where it was.

    Example: int8compile quantize SmolLM2-135M SmolLM2-135M-int8 --verify
    """
    with failures_to_stderr():
        try:
            from int8compile.checkpoints import comparison, convert
            from int8compile.integrations.transformers import Int8Config
        except ImportError as error:
            raise Int8CompileError(
                f"quantize needs transformers: pip install 'int8compile[transformers]' ({error})"
            ) from error
        config = Int8Config(**_options(threshold, skip, weight_only, activation, min_features, calibration))
        if verify:
            comparison.check_comparable(source, format)
        with progress_bars(as_json, DownloadColumn()) as progress:
            done = convert.quantize_folder(source, target, config, format, progress)
        compared = comparison.compare(source, target, format) if verify else None
    if done.unmatched:
        names = ", ".join(done.unmatched)
        err.print(f"--skip or --weight-only that names no linear: {names}", markup=False, highlight=False)
    result: dict[str, Any] = {
        "linears": len(done.sites),
        "int8": sum(site.rewritten for site in done.sites),
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "files_resumed": done.resumed,
        "unmatched": done.unmatched,
        "verify": compared and {"relative_error": compared.error, "top_1_agreement": compared.agreement},
    }
    if as_json:
        print_json(result)
        return
    mib = f"{done.bytes_before / 2**20:.1f} -> {done.bytes_after / 2**20:.1f} MiB"
    out.print(f"{result['int8']} of {result['linears']} linears in int8, {mib}: {target}", highlight=False)
    if compared is not None:
        agreement = f"the same best one in {compared.agreement:.1%} of places"
        out.print(f"outputs for random inputs: relative error {compared.error:.3g}, {agreement}", highlight=False)


@app.command()
def explain(
    model: Model,
    threshold: Threshold = 6.0,
    skip: Skip = None,
    weight_only: WeightOnly = None,
    activation: Activation = "int8",
    min_features: MinFeatures = 128,
    calibration: CalibrationFile = None,
    as_json: AsJson = False,
) -> None:
    """Say which linears of a model would run in int8, which would not, and why. Compiles nothing.

    Example: int8compile explain ./SmolLM2-135M
    """
    with failures_to_stderr(), progress_bars(as_json) as progress:
        progress(f"load {model}", 0, None)
        import torch

        from int8compile.cli.named_models import find
        from int8compile.explanation import explain as explain_model

        found = find(model)
        progress(f"load {model}", 1, 1)
        progress("trace the model", 0, None)
        with torch.no_grad():
            options = _options(threshold, skip, weight_only, activation, min_features, calibration)
            report = explain_model(found.model, *found.args, options=options, **found.kwargs)
    print_json(report.to_dict()) if as_json else out.print(report)


@app.command()
def export(
    model: Model,
    target: Annotated[Path, typer.Argument(help="The program to write, NAME.pt2.")],
    threshold: Threshold = 6.0,
    skip: Skip = None,
    weight_only: WeightOnly = None,
    activation: Activation = "int8",
    min_features: MinFeatures = 128,
    calibration: CalibrationFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as an int8 program, which int8compile.load reads without the model's source.

    Example: int8compile export ./SmolLM2-135M smollm2.pt2
    """
    with failures_to_stderr(), progress_bars(as_json) as progress:
        check_target(f"export {model}", target)
        progress(f"load {model}", 0, None)
        from int8compile.cli.named_models import find
        from int8compile.programs.archive import save
        from int8compile.programs.exporting import export as export_model
        from int8compile.session import last_report

        found = find(model)
        progress(f"load {model}", 1, 1)
        options = _options(threshold, skip, weight_only, activation, min_features, calibration)
        program = export_model(*found, config=options, progress=progress)
        progress(f"write {target}", 0, None)
        save(program, target)
        report = last_report()
    summary = report.summary() if report is not None else ""
    size = target.stat().st_size
    if as_json:
        print_json({"path": str(target), "bytes": size, "report": report and report.to_dict()})
    else:
        out.print(f"{target}: {size / 2**20:.1f} MiB, {summary}", highlight=False)


@app.command()
def package(
    program: Annotated[Path, typer.Argument(help="A program that `int8compile export` wrote.")],
    target: Annotated[Path, typer.Argument(help="The package to write, NAME.pt2.")],
    kernels: Kernels = "auto",
    cpu_isa: Annotated[str | None, typer.Option(help="avx2 (the default on x86-64), portable or native")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a program ahead of time, to be run from Python or C++ (see examples/cpp). Takes a minute or more.

    Example: int8compile package smollm2.pt2 smollm2.aoti.pt2
    """
    with failures_to_stderr(), progress_bars(as_json) as progress:
        progress(f"load {program}", 0, None)
        from int8compile.programs.archive import load
        from int8compile.programs.packaging import package as make_package

        loaded = load(program, kernels)
        progress(f"load {program}", 1, 1)
        progress("compile", 0, None)
        make_package(loaded, target, {"kernels": kernels}, cpu_isa=cpu_isa)
    size = target.stat().st_size
    if as_json:
        print_json({"path": str(target), "bytes": size})
    else:
        out.print(f"{target}: {size / 2**20:.1f} MiB", highlight=False)


def _shapes(text: str | None) -> str | None:
    """As it is, if it can be read."""
    from int8compile.tuning.request import shapes

    try:
        return None if text is None or not shapes(text) else text
    except Int8CompileError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(help="Measure for its shapes; a model as `explain` takes it.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="K x N of weights, such as 576x1536,2048x2048.", callback=_shapes)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; those that it takes by default.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="To measure for, at most.")] = 120,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, and keep nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what was kept, and measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure which CPU kernels are the fastest on this machine, and let every process of this user take those.

    With no model and no shapes: for shapes that many models have. No choice changes a result of an int8 product.

    Example: int8compile tune ./SmolLM2-135M --threads 2
    """
    from int8compile.cli.tuning import print_tuning
    from int8compile.native import tuned
    from int8compile.tuning.request import shapes as read_shapes
    from int8compile.tuning.tune import tune as measure

    with failures_to_stderr(), progress_bars(as_json) as progress:
        if clear:
            removed = tuned.clear()
        else:
            subject: Any = None
            args: tuple[Any, ...] = ()
            kwargs: dict[str, Any] = {}
            if model is not None:
                from int8compile.cli.named_models import find

                progress(f"load {model}", 0, None)
                subject, args, kwargs, _ = find(model)
                progress(f"load {model}", 1, 1)
            given = () if shapes is None else read_shapes(shapes)
            options: dict[str, Any] = {
                "threads": threads,
                "seconds": seconds,
                "keep": not dry_run,
                "progress": progress,
            }
            tuning = measure(subject, *args, shapes=given, **options, **kwargs)
    if clear:
        text = f"removed {removed}" if removed else "there was no tuned table"
        print_json({"removed": removed and str(removed)}) if as_json else out.print(text, highlight=False)
    else:
        print_json(tuning.to_dict()) if as_json else print_tuning(tuning)
        if tuning.unsteady:
            err.print("int8compile: the times are too unsteady to tell anything: measure when the machine is idle")
            raise typer.Exit(1)


def _options(
    threshold: float,
    skip: list[str] | None,
    weight_only: list[str] | None,
    activation: str,
    min_features: int,
    calibration: Path | None = None,
) -> dict[str, Any]:
    return {
        **({} if calibration is None else {"calibration": calibration}),
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": skip or [],
        "llm_int8_weight_only_modules": weight_only or [],
        "activation": activation,
        "min_features": min_features,
    }


def main() -> None:
    """Entry point of the ``int8compile`` command and of ``python -m int8compile.cli``."""
    # As an exception, so that what is half written is removed, as it is after Ctrl-C (which click turns into 130).
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()
