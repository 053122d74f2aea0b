"""transformers: load, quantise while loading, save and dequantise; and bitsandbytes' checkpoints.

``quantizer``     what transformers calls: the configuration and the quantisation method "int8compile"
``loading``       what happens to a linear's entries of a checkpoint
``saving``        a model's state dict in each format
``bitsandbytes``  which linears bitsandbytes has in int8
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
