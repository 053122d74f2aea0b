"""The operators. Importing this package registers them under ``torch.ops.int8compile``.

``linear``            a linear on an int8 weight: quantises the activation and multiplies
``quantize_rowwise``  an activation to int8 codes, row scales and outlier columns
``scaled_mm``         the product of an activation that is quantised already, outlier product included
``quantize_weight``   a float weight to int8 and its scales
``grouped_linear``    the linears of a layer's experts, each on rows of its own; and ``grouped_input_gradient``
``master_linear``     a linear on a float weight that trains, quantised at each call
``attention``         attention of many queries, without a gradient
``input_gradient``    the gradient of an int8 linear with respect to its activation
``int_product``       the exact int32 product of two int8 matrices, for the reference bodies (no operator)
``_library``          ``define``, which registers an operator, and the checks that operators share
"""

from int8compile.ops.attention import attention
from int8compile.ops.grouped_linear import grouped_input_gradient, grouped_linear
from int8compile.ops.input_gradient import input_gradient
from int8compile.ops.linear import linear
from int8compile.ops.master_linear import master_linear
from int8compile.ops.quantize_rowwise import quantize_rowwise
from int8compile.ops.quantize_weight import quantize_weight
from int8compile.ops.scaled_mm import scaled_mm

__all__ = [
    "attention",
    "grouped_input_gradient",
    "grouped_linear",
    "input_gradient",
    "linear",
    "master_linear",
    "quantize_rowwise",
    "quantize_weight",
    "scaled_mm",
]
