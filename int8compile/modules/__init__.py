"""Modules with int8 weights of their own, and ``quantize_`` / ``dequantize_``, which put them in place of linears
and of the experts of mixtures."""
