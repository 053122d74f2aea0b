// Whether kernels of attention compute here what the portable ones do, up to rounding.

#pragma once

#include "attention.h"

namespace int8compile {

bool agrees_with_portable(const AttentionKernels& use);

}  // namespace int8compile
