"""``int8compile quantize``: converts a checkpoint folder to int8, file by file, without ever holding the model.

Each file of weights is read tensor by tensor and written atomically; ``config.json``, without which nothing loads, is
written last. So a run that is killed leaves a folder that does not load. The next run continues after the last complete
file, and its result is that of one run, to the byte. Until the end, ``unfinished.json`` records the files, options and
versions of the run; only a run with the same ones continues. The rules of ``from_pretrained`` decide which tensors
become int8, on a model without memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import safetensors
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import int8compile
from int8compile.checkpoints.plan import Plan
from int8compile.errors import CheckpointError, OptionValueError
from int8compile.files import LOCK, held, remove_left_over, replaced
from int8compile.integrations.transformers import Int8Config
from int8compile.report import Site
from int8compile.weights.formats import FORMATS

_MANIFEST = "unfinished.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")

#: called with a file's name, bytes done and bytes in all
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        sites: every linear's.
        bytes_before, bytes_after: of all files of weights.
        resumed: how many of them an earlier run had finished.
        unmatched: entries of ``llm_int8_skip_modules`` that name no linear.
    """

    sites: list[Site]
    bytes_before: int
    bytes_after: int
    resumed: int
    unmatched: list[str]


def quantize_folder(
    source: Path, target: Path, config: Int8Config, format: str = "int8compile", progress: Progress | None = None
) -> Converted:
    """Write an int8 copy of a transformers checkpoint folder.

    Args:
        source: folder with ``config.json`` and safetensors (or pickled, then read with ``weights_only=True``) weights.
        target: folder to be made, or one that an interrupted run with the same arguments left.
        format: one of ``formats.FORMATS``.

    Raises:
        OptionValueError: a bad argument, or a target that holds something else. Nothing is changed.
        CheckpointError: a file that cannot be read or does not fit the model. The target does not load then.
        OSError: the target cannot be written, such as to a full disk. The same call goes on from there.
    """
    if format not in FORMATS:
        raise OptionValueError("format", format, "one of " + ", ".join(map(repr, FORMATS)))
    files = _weight_files(source)
    model = empty_model(source)
    if getattr(model.config, "quantization_config", None) is not None:
        raise OptionValueError("source", str(source), "a float checkpoint; this one is quantised already")
    plan = Plan(model, [key for file in files for key in _keys(file)], config, format)
    try:
        with _opened_target(target, _manifest(source, files, config, format)):
            return _convert(source, target, files, plan, progress)
    except OSError as error:
        problem = f"{target}: {error.strerror or error}; what is written is kept, and the same call goes on from there"
        raise OSError(error.errno, problem) from error


def _convert(source: Path, target: Path, files: list[Path], plan: Plan, progress: Progress | None) -> Converted:
    began = _stats(source, files)
    weight_map: dict[str, str] = {}
    before, after, resumed = 0, 0, 0
    for file in files:
        written = target / _output_name(file.name)
        if _is_whole(written):
            resumed += 1
        else:
            tensors: dict[str, torch.Tensor] = {}
            total, done = file.stat().st_size, 0
            for key, tensor in _tensors(file):
                tensors |= plan.convert(key, tensor, file)
                done += tensor.numel() * tensor.element_size()
                if progress is not None:
                    progress(file.name, done, total)
            _unchanged(began, source, files)
            _write(written, tensors)
            del tensors
        weight_map |= dict.fromkeys(_keys(written), written.name)
        before, after = before + file.stat().st_size, after + written.stat().st_size
    if len(files) > 1:
        index = {"metadata": {"total_size": after}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(target / "model.safetensors.index.json", index)
    _finish(source, target, plan, began, files)
    return Converted(plan.sites, before, after, resumed, plan.unmatched)


def empty_model(source: Path) -> Any:
    """The transformers model of a checkpoint folder, on the meta device.

    Raises:
        CheckpointError: a ``config.json`` that is missing, broken or of an unknown model.
        OptionValueError: a class that transformers does not have.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (ValueError, OSError) as error:
        problem = f"cannot be read ({str(error).splitlines()[0]})"
        expected = "the configuration of a model that this transformers knows"
        raise CheckpointError("the file", problem, expected, source / "config.json") from error
    name = (config.architectures or ["AutoModel"])[0]
    family = getattr(transformers, name, None)
    if family is None:
        expected = (
            "a class of transformers; a model with code of its own is converted by from_pretrained(..., "
            "trust_remote_code=True, quantization_config=Int8Config()) and save_pretrained"
        )
        raise OptionValueError("architectures", name, expected)
    with torch.device("meta"):
        return family(config) if name != "AutoModel" else family.from_config(config)


def _weight_files(source: Path) -> list[Path]:
    """The files that hold a checkpoint's weights; safetensors where there are both kinds."""
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = source / f"{stem}{ending}.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()), key=str)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                problem = f"cannot be read ({error!r})"
                raise CheckpointError("weight_map", problem, "the file of each tensor, by its key", index) from error
            strange = [
                name for name in names if not isinstance(name, str) or Path(name).name != name or name in ("", "..")
            ]
            if strange:
                expected = f"names of files in {source}"
                raise CheckpointError("weight_map", f"names {strange[0]!r}", expected, index)
            missing = [name for name in names if not (source / name).is_file()]
            if missing:
                raise CheckpointError(missing[0], f"is missing, which {index.name} names", "it", source)
            return [source / name for name in names]
        if (source / f"{stem}{ending}").exists():
            return [source / f"{stem}{ending}"]
    expected = "a folder with config.json and model.safetensors or pytorch_model.bin, whole or in shards"
    raise OptionValueError("source", str(source), expected)


def _keys(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_unpickled(file))
    with _opened(file) as opened:
        return list(opened.keys())


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors, one at a time."""
    if file.suffix == ".bin":
        yield from _unpickled(file).items()
        return
    with _opened(file) as opened:
        for key in opened.keys():  # noqa: SIM118 (it is no dict)
            yield key, opened.get_tensor(key)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError("the file", f"cannot be read ({error})", "a whole safetensors file", file) from error


def _unpickled(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        loaded: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        problem = f"cannot be read ({str(error).splitlines()[0]})"
        raise CheckpointError("the file", problem, "a pickle of nothing but tensors", file) from error
    return loaded


def _output_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _manifest(source: Path, files: list[Path], config: Int8Config, format: str) -> dict[str, Any]:
    """All that makes a run the one that it is."""
    versions = {module.__name__: module.__version__ for module in (int8compile, torch, transformers, safetensors)}
    return {"files": _stats(source, files), "config": config.to_dict(), "format": format, "versions": versions}


def _stats(source: Path, files: list[Path]) -> dict[str, list[int]]:
    """Size and time of each file that is read."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in (*files, source / "config.json")}


def _unchanged(began: dict[str, list[int]], source: Path, files: list[Path]) -> None:
    now = _stats(source, files)
    changed = [name for name in began if began[name] != now[name]]
    if changed:
        raise CheckpointError(changed[0], "was changed while it was read", "a checkpoint that nobody writes to", source)


@contextlib.contextmanager
def _opened_target(target: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Make the folder, or make sure that it is what an interrupted run of the same kind left; held by a lock."""
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected = f"a folder that can be made, or an empty one ({error.strerror})"
        raise OptionValueError("target", str(target), expected) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(lock_file(target)))
        except filelock.Timeout as error:
            expected = "a folder that no other run is writing to at this moment"
            raise OptionValueError("target", str(target), expected) from error
        _check_left(target, manifest)
        yield


def lock_file(target: Path) -> Path:
    """Beside the folder that is written to, in which there is nothing but the checkpoint in the end."""
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}{LOCK}")


def _check_left(target: Path, manifest: dict[str, Any]) -> None:
    remove_left_over(target)
    left = target / _MANIFEST
    if not any(target.iterdir()):
        _write_json(left, manifest)
        return
    if not left.exists():
        raise OptionValueError("target", str(target), "a folder that does not exist or is empty")
    try:
        known = json.loads(left.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        expected = f"one whose {_MANIFEST} can be read ({error}); remove the folder to start anew"
        raise OptionValueError("target", str(target), expected) from error
    # As they are read back: sizes and times are whole numbers, all else are texts and the like.
    if known != json.loads(json.dumps(manifest)):
        expected = "one that a run with the same source and options left unfinished; remove it to start anew"
        raise OptionValueError("target", str(target), expected)


def _is_whole(written: Path) -> bool:
    """Whether a file of weights is there and not cut off: its header says how long it is.

    It was whole and on the disk before it had its name, so what else is wrong with it came later.
    """
    if not written.exists():
        return False
    try:
        with safe_open(written, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _write(written: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replaced(written) as path:
        try:
            # No second entry beside the format: their order in the file would be by chance.
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{written.name} cannot be written ({error})") from error
        shutil.copymode(written.parent / _MANIFEST, path)  # safetensors' own files are for their owner alone


def _finish(source: Path, target: Path, plan: Plan, began: dict[str, list[int]], files: list[Path]) -> None:
    for file in _carried(source, target):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replaced(copy) as path:
            shutil.copy2(file, path)
    content = json.loads((source / "config.json").read_text())
    _unchanged(began, source, files)
    _write_json(target / "config.json", {**content, "quantization_config": plan.quantization_config()})
    (target / _MANIFEST).unlink()


def _carried(source: Path, target: Path) -> list[Path]:
    """What goes along as it is: all but weights, hidden files and ``config.json``.

    Weights that have a ``config.json`` beside them in a folder below go along: they are modules of their own, as in
    sentence-transformers' checkpoints.
    """
    files = []
    for folder, below, inside in os.walk(source):
        here = Path(folder)
        below[:] = [name for name in below if not name.startswith(".") and not (here / name).samefile(target)]
        top = here == source
        module = not top and "config.json" in inside
        for name in inside:
            weights = name.endswith(_WEIGHTS) and not (module and name.endswith((".safetensors", ".bin")))
            if not (weights or name.startswith(".") or (top and name == "config.json")):
                files.append(here / name)
    return files


def _write_json(path: Path, content: object) -> None:
    with replaced(path) as whole:
        whole.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
