// The kernels of this processor's best instruction set, or of the one that QCORE_CPU_ISA names.
#pragma once
#include "kernels.h"

namespace qcore {

// Null where the processor has none of them, or not the one that was asked for.
const Kernels* chosen_kernels();

// The one of this name, or null where the processor does not have it.
const Kernels* kernels_named(const char* name);

}  // namespace qcore
