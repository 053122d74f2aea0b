"""Limits of int8 products and thresholds, which options, operators and rules share."""

from __future__ import annotations

import torch

#: int32 sums of products of two codes in [-127, 127] are exact up to this many (127 * 127 * K < 2**31)
MAX_IN_FEATURES = 131072

#: what activations, weights and outputs can be
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The smallest normal float32. A CPU that flushes subnormal numbers compares with a threshold below it as if it were 0,
#: which every value reaches; the numbers that are rounded to 0 are among those.
SMALLEST_THRESHOLD = 2.0**-126
