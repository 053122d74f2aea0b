"""``Calibration``: which columns of which linears are to have 16-bit codes, and which linears stay in float.

``calibrate`` makes one. The file of one is a safetensors file: the columns of each linear as int32 under its path, and
all else as JSON in its header, with a digest of the whole. It is written whole or not at all, and what has been changed
since is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from int8compile.errors import CalibrationError
from int8compile.files import replaced
from int8compile.limits import MAX_IN_FEATURES

_HEADER = "int8compile_calibration"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CalibratedSite:
    """One linear.

    Args:
        in_features, out_features: K and N of the weight it was made with.
        columns: features whose codes have 16 bits, in ascending order.
        in_float: whether it stays in float, whatever its columns.
        error: the mean square of what rounding its activation changes a row of its output by, relative to the median
            square of a row.
    """

    in_features: int
    out_features: int
    columns: tuple[int, ...]
    in_float: bool = False
    error: float = 0.0


class Calibration:
    """The columns of a model's linears, by module path. Never changes.

    Args:
        sites: module path -> ``CalibratedSite``.
        about: what it was made of: the model's class, the budget and so on, as JSON has it.

    Raises:
        CalibrationError: a site that no linear can have.
    """

    def __init__(self, sites: Mapping[str, CalibratedSite], about: Mapping[str, Any] | None = None) -> None:
        self.sites, self.about = dict(sites), dict(about or {})
        for path, site in self.sites.items():
            _check_site(path, site)
        #: what its file is called, once it has one
        self.path: str | None = None
        text = json.dumps(self.to_dict(), sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def site(self, in_features: int, out_features: int, paths: Iterable[str]) -> CalibratedSite | None:
        """That of a linear which stands at these paths (or whose weight does); None if there is none.

        Raises:
            CalibrationError: there is one of another shape, so this is another model.
        """
        for path in paths:
            found = self.sites.get(path)
            if found is None:
                continue
            if (found.in_features, found.out_features) != (in_features, out_features):
                raise CalibrationError(
                    f"{self.name} was made for another model: {path} is {found.in_features} x {found.out_features} "
                    f"there and {in_features} x {out_features} here; calibrate this model"
                )
            return found
        return None

    @property
    def name(self) -> str:
        """For reports: the file it came from or went to, or the model it was made of, and its digest."""
        return f"calibration {self.path or 'of ' + str(self.about.get('model', 'a model'))} ({self.digest[:8]})"

    @property
    def share(self) -> float:
        """The share of all columns that have 16-bit codes."""
        int8 = [site for site in self.sites.values() if not site.in_float]
        return sum(len(site.columns) for site in int8) / max(1, sum(site.in_features for site in int8))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; ``from_dict`` reads it."""
        sites = {path: dataclasses.asdict(site) | {"columns": list(site.columns)} for path, site in self.sites.items()}
        return {"version": _VERSION, "about": self.about, "sites": sites}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """What ``to_dict`` gave.

        Raises:
            CalibrationError: it is anything else.
        """
        try:
            if values["version"] != _VERSION:
                raise CalibrationError(f"calibration of version {values['version']!r}; expected {_VERSION}")
            sites = {
                str(path): CalibratedSite(**{**site, "columns": tuple(site["columns"])})
                for path, site in values["sites"].items()
            }
            return cls(sites, values["about"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"this is no calibration: {type(error).__name__} {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, ``calibration.safetensors`` if the path is a folder that is there; returns the file's path.

        Raises:
            CalibrationError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        import torch

        target = _file(path)
        save_file = _safetensors("torch").save_file
        columns = {name: torch.tensor(site.columns, dtype=torch.int32) for name, site in self.sites.items()}
        values = self.to_dict()
        for site in values["sites"].values():
            del site["columns"]
        # safetensors makes files that nobody else may read.
        with replaced(target, f"calibration.save({str(path)!r})", None if target.exists() else 0o644) as whole:
            save_file(columns, whole, {_HEADER: json.dumps({**values, "digest": self.digest})})
        self.path = str(target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what ``save`` wrote: the file, or the folder it is in.

        Raises:
            FileNotFoundError: there is no such file.
            CalibrationError: it is no calibration, damaged, or was edited.
        """
        source = _file(path)
        if not source.is_file():
            raise FileNotFoundError(f"there is no calibration {str(source)!r}; int8compile calibrate makes one")
        try:
            with _safetensors().safe_open(str(source), "pt") as file:
                values = json.loads((file.metadata() or {})[_HEADER])
                columns = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
            if set(columns) != set(values["sites"]):
                raise CalibrationError("columns and sites differ")
            for name, site in values["sites"].items():
                site["columns"] = columns[name]
            digest = values.pop("digest")
            made = cls.from_dict(values)
        except (KeyError, TypeError, AttributeError, ValueError, OSError, _safetensors().SafetensorError) as error:
            raise CalibrationError(
                f"{str(source)!r} is no calibration, or not whole ({error}); int8compile calibrate makes one"
            ) from error
        if digest != made.digest:
            raise CalibrationError(
                f"{str(source)!r} was changed after it was made; int8compile calibrate makes another"
            )
        made.path = str(source)
        return made

    @classmethod
    def make(cls, value: object) -> Calibration:
        """From what an option may be: a ``Calibration``, a path, or what ``to_dict`` gave."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, (str, os.PathLike)):
            return cls.load(value)
        raise CalibrationError(f"calibration={value!r}; expected a Calibration, or the path of one")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        """The same for equal ones, in every process: it is part of the compile caches' keys."""
        return f"Calibration({self.digest})"

    def __deepcopy__(self, memo: object) -> Calibration:
        return self


def _check_site(path: str, site: CalibratedSite) -> None:
    sizes = (site.in_features, site.out_features)
    ints = all(type(n) is int for n in (*sizes, *site.columns))
    pairs = zip(site.columns, site.columns[1:], strict=False)
    if not (
        ints
        and 0 < site.in_features <= MAX_IN_FEATURES
        and site.out_features > 0
        and all(a < b for a, b in pairs)
        and all(0 <= c < site.in_features for c in site.columns)
    ):
        raise CalibrationError(
            f"calibration of {path}: {site.in_features!r} x {site.out_features!r} with {len(site.columns)} columns; "
            "expected positive sizes, and features in ascending order below the first"
        )


def _file(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    return given / "calibration.safetensors" if given.is_dir() else given


def _safetensors(part: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(f"safetensors.{part}" if part else "safetensors")
    except ImportError as error:
        raise CalibrationError("files of calibrations need safetensors: pip install safetensors") from error
