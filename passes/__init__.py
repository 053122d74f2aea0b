"""The rewrites, in the order they run. Each is a function ``(graph, context) -> number of changes``.

``expand``        PyTorch's fused attention calls become the operations they stand for
``group_heads``   attention reads each key/value head once, not a copy for each query head
``attend``        attention becomes ``int8compile.attention`` where that is faster
``fold_queries``  attention of one query reads the query heads of a group as rows
``normalize``     every form of a linear becomes one canonical node
``quantize``      each eligible linear becomes ``int8compile.linear``, each other gets a Reason
``experts``       products with experts' weights become ``int8compile.grouped_linear``
``merge``         linears that read one activation become one product
``share``         an activation that several linears still read is quantised once for all of them
``verify``        the result obeys the rules, or VerifyError

A pass only rewrites: removing what became dead, linting, timing and logging are the runner's (``runner.py``).
"""

from int8compile.config import PASS_NAMES
from int8compile.passes.attend import attend
from int8compile.passes.context import PassContext
from int8compile.passes.expand import expand
from int8compile.passes.experts import experts
from int8compile.passes.fold_queries import fold_queries
from int8compile.passes.group_heads import group_heads
from int8compile.passes.merge import merge
from int8compile.passes.normalize import normalize
from int8compile.passes.quantize import quantize
from int8compile.passes.runner import Pass, run
from int8compile.passes.share import share
from int8compile.passes.verify import verify

#: the passes in the order of PASS_NAMES in config.py; each name is that of its function
PIPELINE: tuple[Pass, ...] = tuple(globals()[name] for name in PASS_NAMES)

__all__ = [
    "PIPELINE",
    "PassContext",
    "attend",
    "expand",
    "experts",
    "fold_queries",
    "group_heads",
    "merge",
    "normalize",
    "quantize",
    "run",
    "share",
    "verify",
]
