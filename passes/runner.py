"""Runs the pipeline: times, lints and logs each pass and removes what it left dead.

Dead is what nothing reads any more because of a pass: what it put in without a reader, and what lost its last. The
user's own dead nodes stay as they are, and so does what might do more than compute its value.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import fx

from int8compile.graph.dump import dump
from int8compile.passes.analysis.effects import only_computes
from int8compile.passes.context import PassContext

log = logging.getLogger(__name__)

Pass = Callable[[fx.Graph, PassContext], int]


def run(pipeline: Sequence[Pass], context: PassContext) -> tuple[dict[str, int], dict[str, float]]:
    """Run the passes that are not disabled; returns each one's number of changes and seconds."""
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    graph = context.capture.graph
    for rewrite in pipeline:
        name = rewrite.__name__
        if name in context.config.disable_passes:
            continue
        start = time.perf_counter()
        counts[name] = rewrite(graph, context)
        if counts[name]:
            _remove_dead(graph, context)
            context.capture.drop_unused_inputs()
            graph.lint()
        seconds[name] = time.perf_counter() - start
        log.debug("%s: %d changes in %.1f ms", name, counts[name], 1e3 * seconds[name])
        if counts[name] and log.isEnabledFor(logging.DEBUG):
            log.debug("graph after %s:\n%s", name, dump(graph))
    context.capture.gm.recompile()
    return counts, seconds


def _remove_dead(graph: fx.Graph, context: PassContext) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node not in context.unread and only_computes(node):
            graph.erase_node(node)
