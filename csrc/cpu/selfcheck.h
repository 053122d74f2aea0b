// Whether a provider computes on this CPU what the portable one does: a few milliseconds on small random problems.

#pragma once

#include "kernels.h"

namespace int8compile {

bool agrees_with_portable(const Kernels& use);

}  // namespace int8compile
