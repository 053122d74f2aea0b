"""``int8compile calibrate`` and ``compare``: what int8 changes of a model, and columns that make it change less.

A transformers model is called with a text, in windows of tokens; a model of ``module:function`` with the arguments that
the function gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from int8compile.cli.commands import (
    Activation,
    AsJson,
    CalibrationFile,
    MinFeatures,
    Model,
    Skip,
    Threshold,
    WeightOnly,
    _options,
    app,
)
from int8compile.cli.output import err, failures_to_stderr, out, print_json, progress_bars
from int8compile.errors import CalibrationError

Text = Annotated[Path | None, typer.Option(help="A text, as UTF-8, of the kind that the model is meant for.")]
Windows = Annotated[int, typer.Option(min=1, help="Of the text, at most, as evenly spaced as they come.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


@app.command()
def calibrate(
    model: Model,
    text: Text = None,
    target: Annotated[Path, typer.Option("--output", help="The file to write, or a folder that is there.")] = Path(
        "calibration.safetensors"
    ),
    budget: Annotated[float, typer.Option(min=0, max=1, help="The share of columns with 16-bit codes.")] = 0.02,
    max_float_weights: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the linears' weights that may stay in float.")
    ] = 0.0,
    windows: Windows = 32,
    length: Length = 512,
    skip: Skip = None,
    weight_only: WeightOnly = None,
    min_features: MinFeatures = 128,
    as_json: AsJson = False,
) -> None:
    """Choose the columns of a model's linears whose codes have 16 bits, by what it computes on a text.

    Example: int8compile calibrate ./SmolLM2-135M --text book.txt --output ./SmolLM2-135M
    """
    with failures_to_stderr(), progress_bars(as_json) as progress:
        if not target.is_dir() and not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write {target.name} to")
        subject, batches = _subject(model, text, windows, length, progress)
        from int8compile.calibrating.calibrate import calibrate as make

        total = len(batches)
        told = _told(batches, "calibrate", progress)
        options = _options(6.0, skip, weight_only, "int8", min_features)
        made = make(subject, told, budget, max_float_weights, progress=False, config=options)
        written = made.save(target)
    in_float = sorted(path for path, site in made.sites.items() if site.in_float)
    unreached = made.about["unreached"]
    if as_json:
        print_json(
            {"path": str(written), "digest": made.digest, "share": made.share, "linears": len(made.sites)}
            | {"in_float": in_float, "unreached": unreached, "batches": total, "rows": made.about["rows"]}
        )
        return
    out.print(
        f"{written}: {len(made.sites)} linears, {made.share:.2%} of their columns in 16 bits, {len(in_float)} in float",
        highlight=False,
    )
    if unreached:
        err.print(
            f"{len(unreached)} linears were not called, and keep looking for outliers: {', '.join(unreached[:5])}"
        )


@app.command()
def compare(
    model: Model,
    text: Text = None,
    calibration: CalibrationFile = None,
    windows: Windows = 2,
    length: Length = 256,
    each: Annotated[bool, typer.Option(help="The loss with each linear alone in int8: a call for each.")] = True,
    threshold: Threshold = 6.0,
    skip: Skip = None,
    weight_only: WeightOnly = None,
    activation: Activation = "int8",
    min_features: MinFeatures = 128,
    as_json: AsJson = False,
) -> None:
    """Say what int8 changes of a model on a text, linear by linear, the worst first.

    Example: int8compile compare ./SmolLM2-135M --text book.txt --calibration ./SmolLM2-135M --no-each
    """
    with failures_to_stderr(), progress_bars(as_json) as progress:
        subject, batches = _subject(model, text, windows, length, progress)
        from int8compile.calibrating.compare import compare as measure

        options = _options(threshold, skip, weight_only, activation, min_features, calibration)
        if each:
            progress("compare", 0, None)
        result = measure(subject, batches, options, each=each, progress=False)
    print_json(result.to_dict()) if as_json else out.print(result)


def _subject(name: str, text: Path | None, windows: int, length: int, progress: Any) -> tuple[Any, list[Any]]:
    """A model, and what it is to be called with."""
    progress(f"load {name}", 0, None)
    from int8compile.cli.named_models import find

    found = find(name)
    progress(f"load {name}", 1, 1)
    if text is None:
        if ":" not in name:
            raise CalibrationError(f"{name} needs a text to be called with: --text FILE")
        return found.model, [found.kwargs] if not found.args else [_arguments(found)]
    return found.model, _windows(name, text.read_text(encoding="utf-8"), windows, length)


def _arguments(found: Any) -> Any:
    if found.kwargs:
        raise CalibrationError("the function gives args and kwargs; expected one of them, for a batch is either")
    return found.args


def _windows(name: str, text: str, count: int, length: int) -> list[dict[str, Any]]:
    """Windows of a text's tokens, evenly spaced."""
    import torch

    try:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (ImportError, OSError, ValueError) as error:
        raise CalibrationError(f"{name} has no tokenizer for --text ({error})") from error
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)] or [tokens]
    if not tokens:
        raise CalibrationError("the text of --text has no tokens; expected some pages")
    chosen = [pieces[i * len(pieces) // count] for i in range(count)] if count < len(pieces) else pieces
    return [{"input_ids": torch.tensor([piece])} for piece in chosen]


def _told(batches: list[Any], step: str, progress: Any) -> Any:
    progress(step, 0, len(batches))
    for done, batch in enumerate(batches, 1):
        yield batch
        progress(step, done, len(batches))
