// An operator call in which the weight alone is int8: activations stay floats, and their products are summed in fp32.

#pragma once

#include "product.h"

namespace int8compile {

// out = weight_scale * (x times the transpose of weight) + bias. An output depends on its row and column alone.
void weight_only_linear(const Activation& x, const Product& product);

}  // namespace int8compile
