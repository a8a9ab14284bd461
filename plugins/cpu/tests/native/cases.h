// Kinds of cases, each with a file of its own.
#pragma once
#include "kernels.h"
#include "numbers.h"

namespace qcore {

// How many cases there were, how many were wrong, and the greatest error of each type of activations.
struct Tally {
  int cases = 0, wrong = 0;
  double most[3] = {};

  // Whether the error is one that kernels may have.
  bool count(Float type, double error) {
    const bool good = error <= bound_of(type);
    double& highest = most[static_cast<int>(type)];
    highest = error <= highest ? highest : error;
    cases++, wrong += !good;
    return good;
  }
};

void linear_cases(const Kernels& kernels, Tally& tally);     // all codes, scales, offsets, inputs, orders
void grid_cases(const Kernels& kernels, Tally& tally);       // ggml's blocks whose codes name tuples
void product_cases(const Kernels& kernels, Tally& tally);    // several weights at once
void score_cases(const Kernels& kernels, Tally& tally);      // dense rows
void attention_cases(const Kernels& kernels, Tally& tally);  // of a decoder's step, and the rows that it keeps
bool blocks_are_taken_apart();

}  // namespace qcore
