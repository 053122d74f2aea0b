"""The operators. Importing this package registers them under ``torch.ops.int8compile``."""

from int8compile.ops.input_gradient import input_gradient
from int8compile.ops.linear import linear
from int8compile.ops.master_linear import master_linear
from int8compile.ops.quantize_rowwise import quantize_rowwise
from int8compile.ops.quantize_weight import quantize_weight
from int8compile.ops.scaled_mm import scaled_mm

__all__ = ["input_gradient", "linear", "master_linear", "quantize_rowwise", "quantize_weight", "scaled_mm"]
