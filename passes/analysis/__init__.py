"""Questions that passes ask about a graph before they change it.

``effects``    which memory each node reads, writes and hands on
``regions``    under which switches (gradients, autocast, transforms of torch.func) each node stands
``arguments``  a call's arguments by the names in its operator's schema
``attentions`` which calls of PyTorch's attention may get another form
``linears``    which nodes compute a linear, in the forms that ``normalize`` lists
``experts``    which nodes multiply by experts' weights, and which linears choose among experts
``fused``      PyTorch's fused attention calls, and what they compute
``overlaps``   inputs that share memory at a later call and did not at first
``slices``     which weights are rows of a parameter
``readers``    which int8 linears read one activation
``sites``      what the report says of each linear
"""

from int8compile.passes.analysis.effects import Effects
from int8compile.passes.analysis.regions import regions, transformed

__all__ = ["Effects", "regions", "transformed"]
