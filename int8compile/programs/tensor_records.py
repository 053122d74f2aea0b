"""Checks the tensors in a program's file: raw bytes of storages, and JSON with the layout of tensors in them.

torch believes the JSON. From a record without bytes it makes a tensor of zeros as large as the JSON says, and whether
the graph expects a tensor of those sizes shows only when it runs, if at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from int8compile.programs.records import Records
from int8compile.torch_internals.files import dtype_of
from int8compile.torch_internals.tensors import storage_key

_PATH = re.compile(r"(weight|tensor)_\d+")
_STRIDED = 7  # as torch numbers layouts in its files
_KINDS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}


def check(config: Mapping[str, Any], folder: str, records: Records) -> set[str]:
    """The records that a config's tensors lie in.

    Args:
        config: by name, entries of torch's ``PayloadMeta`` schema.
        folder: of their records.

    Raises:
        ProgramFileError: a record is missing, is not exactly as long as its tensors reach, or is of two dtypes.
        ValueError: an entry makes no sense.
    """
    reach: dict[str, int] = {}
    kinds: dict[str, Any] = {}
    for name, entry in config.items():
        record, meta = folder + entry["path_name"], entry["tensor_meta"]
        if not _PATH.fullmatch(entry["path_name"]) or record not in records:
            raise records.damaged(f"{name} is said to be in {record}, which is not there")
        if meta is None or meta["layout"] != _STRIDED:
            raise records.damaged(f"nothing says how {name} lies in its memory")
        sizes, strides = ([_whole(size) for size in meta[key]] for key in ("sizes", "strides"))
        offset = _whole(meta["storage_offset"])
        if len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
            raise records.damaged(f"{name} has sizes {sizes} and strides {strides} from {offset}")
        kind = (meta["dtype"], meta["device"])
        if kinds.setdefault(record, kind) != kind:
            raise records.damaged(f"{name} has another dtype or device than what lies in the same memory")
        reach[record] = max(reach.get(record, 0), _extent(sizes, strides, offset))
    for record, elements in reach.items():
        size = elements * dtype_of(kinds[record][0]).itemsize
        if records[record].size != size:
            raise records.damaged(f"{record} has {records[record].size} bytes, and its tensors need {size}")
    return set(reach)


def check_inputs(graph_module: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError unless the graph means the tensors that are there: each by its name, dtype, sizes and device."""
    values = graph_module["graph"]["tensor_values"]
    for spec in graph_module["signature"]["input_specs"]:
        ((kind, entry),) = spec.items()
        if kind not in _KINDS:
            continue
        name, argument = entry[_KINDS[kind]], entry["arg"]["name"]
        if name not in tensors or argument not in values:
            raise ValueError(f"{argument}, which is {name}, is missing")
        is_there, meant = tensors[name]["tensor_meta"], values[argument]
        for key in ("dtype", "sizes", "device"):
            if is_there[key] != meant[key]:
                raise ValueError(f"{name} has another {key} than in the graph")


def without_gaps(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, copied where they do not fill their memory, all of which would be written.

    Those that share a memory, as tied weights do, share one in what is returned.
    """
    sharing: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(storage_key(tensor), []).append(name)
    found = dict(tensors)
    for names in sharing.values():
        of_one_dtype: dict[torch.dtype, list[str]] = {}
        for name in names:
            of_one_dtype.setdefault(tensors[name].dtype, []).append(name)
        for group in of_one_dtype.values():
            found |= _filling({name: tensors[name] for name in group})
    return found


def _filling(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same for tensors of one dtype in one memory."""
    first = next(iter(tensors.values()))
    spans = {
        name: (int(t.storage_offset()), _extent(t.shape, t.stride(), int(t.storage_offset())))
        for name, t in tensors.items()
    }
    start = min((at for at, stop in spans.values() if stop), default=0)
    end = max(stop for _, stop in spans.values())
    if start == 0 and end * first.itemsize == first.untyped_storage().nbytes():
        return tensors
    flat = first.detach().as_strided((end - start,), (1,), start).clone()
    result = {}
    for name, tensor in tensors.items():
        at, stop = spans[name]
        view = flat.as_strided(tensor.shape, tensor.stride(), at - start if stop else 0)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        result[name] = torch.nn.Parameter(view, tensor.requires_grad) if is_parameter else view
    return result


def _extent(sizes: Any, strides: Any, offset: int) -> int:
    """How many elements of the memory lie before the tensor's end."""
    if 0 in sizes:
        return 0
    return int(offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1)


def _whole(size: Mapping[str, Any]) -> int:
    if "as_int" not in size:
        raise ValueError(f"{size!r:.80}, where a number is expected")
    return int(size["as_int"])
