"""Modules that hold int8 weights themselves, and ``quantize_`` / ``dequantize_``, which exchange linears for them."""
