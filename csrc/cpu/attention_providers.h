// The choice among kernels of attention, which follows that of the int8 provider.

#pragma once

#include "attention.h"

namespace int8compile {

// The best that takes a dtype, belongs to no newer instruction set than the provider in use, and passed its check; or
// what set_attention() asked for, where it takes the dtype.
const AttentionKernels& attention_kernels(Float type);

}  // namespace int8compile
