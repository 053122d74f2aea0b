"""Questions that passes ask about a graph before they change it.

``effects``  which memory each node reads, writes and hands on
``regions``  under which switches (gradients, autocast, transforms of torch.func) each node stands
"""

from int8compile.passes.analysis.effects import Effects
from int8compile.passes.analysis.regions import regions, transformed

__all__ = ["Effects", "regions", "transformed"]
