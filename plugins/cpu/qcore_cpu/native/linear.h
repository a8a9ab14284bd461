// y = x W^T with a packed weight.
#pragma once
#include "kernels.h"

namespace qcore {

// x: [rows][columns] of `type`, rows `stride` elements apart; out: [rows][weight rows] of the same type. The header must have been
// checked.
void linear(const Kernels& kernels, const Header& weight, const void* x, int64_t rows, int64_t stride, Float type, void* out);

struct Product {
  const Header* weight;
  void* out;  // [weight rows]
};

// A row of `type` by each of several weights, in as few steps as they allow: one that all have, of weights of as many columns, or, where
// there is a stride, each product its own, so many elements behind the one before.
void linears(const Kernels& kernels, const Product* products, int count, const void* x, int64_t stride, Float type);

// Null, or what is wrong with `bytes` bytes as a packed weight.
const char* fault_of(const Header* weight, int64_t bytes);

}  // namespace qcore
