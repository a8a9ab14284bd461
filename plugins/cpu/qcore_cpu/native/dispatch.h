// The kernels of this processor's best instruction set, or of the one that QCORE_CPU_ISA names.
#pragma once
#include "kernels.h"

namespace qcore {

// Null where the processor has none of them, or not the one that was asked for.
const Kernels* chosen_kernels();

}  // namespace qcore
