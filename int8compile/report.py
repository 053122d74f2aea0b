"""The report of what was done to a model and why: ``Site``, ``Reason``, ``GraphReport`` and ``Report``."""

from __future__ import annotations

import dataclasses
import enum
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import rich.box
import rich.console
import rich.table

NOT_CALIBRATED = "not in the calibration"
#: what a table says of int8 linears, of their details
_NOTES = ("weights only", "calibrated", NOT_CALIBRATED)
UNMATCHED = "llm_int8_skip_modules and llm_int8_weight_only_modules that name no linear"


class Reason(enum.Enum):
    """Why a linear was rewritten or left in float. The value says it in words, with the way out where there is one."""

    REWRITTEN = "runs in int8"
    PREQUANTIZED = "runs in int8, on int8 weights of its own (Int8Linear, Int8Experts)"
    SKIPPED = "named by llm_int8_skip_modules"
    OUTPUT_EMBEDDING = (
        "output embedding, or tied to an embedding; skip_output_embeddings=False takes it too, and "
        "llm_int8_weight_only_modules=['lm_head'] its weights alone"
    )
    CALIBRATED = "left in float by the calibration, as one of those that int8 changes most (max_float_weights)"
    TOO_SMALL = "fewer features than min_features, where int8 does not pay"
    DTYPE = "not float32, float16 or bfloat16"
    TRAINABLE = "its weight needs a gradient; call under torch.no_grad(), or requires_grad_(False) on it"
    SUBCLASS = "its weight or activation is a tensor subclass"
    SHARDED = (
        "a product of DTensors that is none of their shards: it needs gradients (freeze what does not train), or their "
        "layouts are not those of a column-wise or row-wise linear"
    )
    CUSTOM = "a module with a forward of its own, which may do more than a linear"
    NOT_CONSTANT = "its weight is not a parameter or buffer but is computed, or passed in, at each call"
    FROZEN = (
        "a constant of inductor's freezing, which lets no weight change; "
        "turn it off (torch._inductor.config.freezing, TORCHINDUCTOR_FREEZING)"
    )
    MUTATED = "its weight is changed inside the graph"
    RESHAPED = "its activation, weight, bias or result is given another shape or memory in place (unsqueeze_, t_, set_)"
    FORM = "a form of product without an int8 operator: out=, alpha, beta, or a bias that is not [out_features]"
    EXPERTS = (
        "several matrices in one weight (experts'), in a module other than transformers' experts, or for the backend "
        "in a form other than torch's grouped_mm and bmm (transformers: experts_implementation='grouped_mm')"
    )
    ROUTER = "chooses among experts: its numbers decide what runs, and it is small"
    UNREAD = "nothing reads its result, so that it need not be computed at all"
    SHAPE = "its weight is not a matrix, or has more than 131072 input features"
    NESTED = "inside a higher-order operator (such as activation checkpointing) or a transform of torch.func"
    FUSED = "read by one of PyTorch's fused attention calls, which was not taken apart"
    DISABLED = "the pass that rewrites it is in disable_passes"


@dataclasses.dataclass(frozen=True)
class Site:
    """One linear operation of the model.

    Args:
        path: module path, such as ``model.layers.0.self_attn.q_proj``.
        in_features, out_features: K and N of the weight.
        dtype: of the output, such as ``"bfloat16"``.
        reason: why it was rewritten, or why not.
        detail: what in particular, such as the pattern that matched; "weights only" where activations stay float.
        experts: how many matrices its weight holds, of experts; None for a plain linear.
    """

    path: str
    in_features: int
    out_features: int
    dtype: str
    reason: Reason
    detail: str = ""
    experts: int | None = None

    @property
    def size(self) -> str:
        """``4096 x 14336``, and with experts ``8 x 4096 x 14336``."""
        return " x ".join(str(n) for n in (self.experts, self.in_features, self.out_features) if n is not None)

    @property
    def rewritten(self) -> bool:
        return self.reason in (Reason.REWRITTEN, Reason.PREQUANTIZED)


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """Memory of one parameter or buffer as one graph uses it, in bytes; ``key`` is the same for the same tensor."""

    key: int
    float_bytes: int
    int8_bytes: int
    reads_float: bool


@dataclasses.dataclass(frozen=True)
class GraphBreak:
    """Where Dynamo had to leave the graph, in the user's code."""

    reason: str
    location: str


@dataclasses.dataclass
class GraphReport:
    """One compiled graph; with no ``compile_id``, a whole model that was converted in place.

    ``unmatched``: entries of ``llm_int8_skip_modules`` and ``llm_int8_weight_only_modules`` that name no linear in it.
    ``calibration``: what the one in use is called.
    """

    compile_id: str
    provider: str
    sites: list[Site] = dataclasses.field(default_factory=list)
    weights: list[WeightUse] = dataclasses.field(default_factory=list)
    graph_break: GraphBreak | None = None
    unmatched: tuple[str, ...] = ()
    pass_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    calibration: str | None = None

    @property
    def frame(self) -> str:
        """The compiled frame; a recompile has the same frame, ``3/1`` after ``3/0``."""
        return self.compile_id.split("/")[0]


@dataclasses.dataclass
class Report:
    """All graphs of one model. ``print()`` it for a table."""

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    recompiles: int = 0

    def add(self, graph: GraphReport) -> None:
        """Add a graph. If it is a recompile of a frame, it replaces the graphs of that frame's earlier compile.

        Several graphs of one compile are parts of it, as ``DistributedDataParallel`` splits them.
        """
        earlier = [old for old in self.graphs if old.frame == graph.frame and old.compile_id != graph.compile_id]
        if not earlier:
            self.graphs.append(graph)
            return
        others = [old for old in self.graphs if all(old is not gone for gone in earlier)]
        at = next(i for i, old in enumerate(self.graphs) if old is earlier[0])
        self.graphs = [*others[:at], graph, *others[at:]]
        self.recompiles += 1

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def rewritten(self) -> int:
        return sum(site.rewritten for site in self.sites)

    @property
    def attentions(self) -> int:
        """Calls of PyTorch's attention that became ``int8compile.attention``."""
        return sum(graph.pass_counts.get("attend", 0) for graph in self.graphs)

    @property
    def breaks(self) -> list[GraphBreak]:
        return [graph.graph_break for graph in self.graphs if graph.graph_break is not None]

    @property
    def unmatched(self) -> list[str]:
        """Entries of the options' lists of modules that name no linear in any graph: a typo, most likely."""
        graphs = [set(graph.unmatched) for graph in self.graphs]
        return sorted(set.intersection(*graphs)) if graphs else []

    @property
    def calibrations(self) -> list[str]:
        """The calibrations in use, by name: none, or one."""
        return sorted({graph.calibration for graph in self.graphs if graph.calibration is not None})

    @property
    def uncalibrated(self) -> int:
        """Int8 linears that the calibration in use does not know, which look for outliers at each call."""
        return sum(site.rewritten and NOT_CALIBRATED in site.detail for site in self.sites)

    @property
    def providers(self) -> list[str]:
        """The code that computes the int8 products, such as ``["native avx2 (cpu)"]``."""
        return sorted({graph.provider for graph in self.graphs})

    @property
    def weight_bytes_before(self) -> int:
        """Bytes of all parameters and buffers that the graphs read."""
        return sum({use.key: use.float_bytes for use in self._uses}.values())

    @property
    def weight_bytes_after(self) -> int:
        """Bytes that the rewritten graphs read: int8 weights, scales, and what stays float."""
        int8 = {(use.key, use.int8_bytes) for use in self._uses if use.int8_bytes}
        floats = {use.key: use.float_bytes for use in self._uses if use.reads_float}
        return sum(size for _, size in int8) + sum(floats.values())

    @property
    def _uses(self) -> list[WeightUse]:
        return [use for graph in self.graphs for use in graph.weights]

    def summary(self) -> str:
        """``210 of 211 linears, 1 left in float (OUTPUT_EMBEDDING lm_head)``."""
        left = [site for site in self.sites if not site.rewritten]
        text = f"{self.rewritten} of {len(self.sites)} linears"
        if not left:
            return text
        by_reason: dict[Reason, list[Site]] = {}
        for site in left:
            by_reason.setdefault(site.reason, []).append(site)
        why = "; ".join(
            f"{reason.name} {sites[0].path}" if len(sites) == 1 else f"{len(sites)} {reason.name}"
            for reason, sites in by_reason.items()
        )
        return f"{text}, {len(left)} left in float ({why})"

    def commonest_refusal(self) -> Reason | None:
        counts = Counter(site.reason for site in self.sites if not site.rewritten)
        return counts.most_common(1)[0][0] if counts else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers."""
        return {
            "sites": [dataclasses.asdict(site) | {"reason": site.reason.name} for site in self.sites],
            "rewritten": self.rewritten,
            "graphs": len(self.graphs),
            "recompiles": self.recompiles,
            "breaks": [dataclasses.asdict(b) for b in self.breaks],
            "weight_bytes_before": self.weight_bytes_before,
            "weight_bytes_after": self.weight_bytes_after,
            "providers": self.providers,
            "attentions": self.attentions,
            "unmatched": self.unmatched,
            "calibrations": self.calibrations,
            "uncalibrated": self.uncalibrated,
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        dots = "…" if console.encoding.startswith("utf") else "..."
        yield from _table(folded(self.sites), options.max_width, dots)
        yield self.summary()
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}, {len(self.breaks)} graph breaks, "
        compiled = any(graph.compile_id for graph in self.graphs)
        yield f"{graphs if compiled else ''}kernels: {', '.join(self.providers) or 'none'}"
        for graph_break in self.breaks:
            yield f"  break at {graph_break.location}: {graph_break.reason.splitlines()[0]}"
        if self.attentions:
            yield f"attention by int8compile's kernels: {self.attentions} call{'s' * (self.attentions != 1)}"
        before, after = self.weight_bytes_before, self.weight_bytes_after
        if before:
            yield f"weights read: {_mib(before)} before, {_mib(after)} after ({after / before:.2f}x)"
        for name in self.calibrations:
            unknown = f"; {self.uncalibrated} linears are not in it, and look for outliers" if self.uncalibrated else ""
            yield f"{name}{unknown}"
        if self.unmatched:
            yield f"{UNMATCHED}: {', '.join(self.unmatched)}"
        for reason in {site.reason: None for site in self.sites if not site.rewritten}:
            yield f"  {reason.name}: {reason.value}"

    def __str__(self) -> str:
        text = io.StringIO()
        rich.console.Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue()


#: like sites of repeated layers as one, and how many
_Rows = Counter[Site]


def folded(sites: list[Site]) -> _Rows:
    """Like sites of repeated layers as one row: ``layers.0.fc``, ``layers.1.fc`` -> ``layers.*.fc``, with a count."""
    paths = [re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", site.path) for site in sites]
    details = [re.sub(r"\d+ calibrated columns?", "calibrated", site.detail) for site in sites]
    return Counter(
        dataclasses.replace(site, path=path, detail=detail)
        for site, path, detail in zip(sites, paths, details, strict=True)
    )


def _table(rows: _Rows, width: int, dots: str) -> Iterator[rich.console.RenderableType]:
    """Folded sites as a table of at most that width, in which no name breaks but between its parts.

    Where it would, what most of the names begin with is said once, above the table, and ``dots`` stand for it.
    """
    names = [site.path for site in rows]
    cells = [(str(count), site.size, site.dtype) for site, count in rows.items()]
    outcomes = [_outcome(site) for site in rows]
    words = [len(word) for outcome in outcomes for word in outcome.split()]
    beside = 14 + sum(max(map(len, column)) for column in zip(("count", "K x N", "dtype"), *cells, strict=True))
    room = width - beside - max(words, default=0)
    if _longest(names) > room and (prefix := _commonest_prefix(names)):
        yield f"{dots} stands for {prefix}"
        names = [dots + name.removeprefix(prefix) if name.startswith(prefix) else name for name in names]
    if _longest(names) > room:
        parts = _longest(part for name in names for part in name.split("."))
        room = max(room, min(parts + 1, width - beside - _longest(reason.name for reason in Reason)), len("linear"))
        names = [_cut(name, room) for name in names]
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("linear", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("K x N", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    for name, middle, outcome in zip(names, cells, outcomes, strict=True):
        table.add_row(name, *middle, outcome, style=None if outcome.startswith("int8") else "yellow")
    yield table


def _outcome(site: Site) -> str:
    if site.rewritten:
        return ", ".join(["int8", *(n for n in site.detail.split(", ") if n in _NOTES)])
    return f"float: {site.reason.name} {site.detail}".rstrip()


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def _commonest_prefix(names: list[str]) -> str:
    """The beginning, up to a dot, without which the names are shortest in all: ``model.layers.*.``, or nothing."""
    prefixes = Counter(name[: dot.end()] for name in names for dot in re.finditer(r"\.", name))
    return max((p for p, count in prefixes.items() if count > 1), key=lambda p: prefixes[p] * len(p), default="")


def _cut(name: str, width: int) -> str:
    """In lines, after dots where that will do."""
    lines = [""]
    for part in re.findall(rf"[^.]{{1,{width - 1}}}\.|[^.]{{1,{width}}}|\.", name):
        if len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
