"""transformers: loading, quantising while loading, saving, dequantising, and bitsandbytes' checkpoints.

``quantizer``     the configuration and the quantisation method "int8compile", which transformers calls
``loading``       quantises or accepts a linear's entries of a checkpoint
``experts``       does so for experts, which transformers stacks and takes apart
``after_loading`` completes what a checkpoint lacked, and refuses what cannot be
``saving``        makes a model's state dict in each format
``bitsandbytes``  finds the linears that bitsandbytes has in int8
"""

from int8compile.integrations.transformers.quantizer import (
    Int8Config,
    Int8Quantizer,
    attach_,
    refused_linears,
    save_pretrained,
    take_over_bitsandbytes,
)

__all__ = [
    "Int8Config",
    "Int8Quantizer",
    "attach_",
    "refused_linears",
    "save_pretrained",
    "take_over_bitsandbytes",
]
