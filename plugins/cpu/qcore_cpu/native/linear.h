// y = x W^T with a packed weight.
#pragma once
#include "kernels.h"

namespace qcore {

// Rows of activations, `stride` elements apart.
struct Given {
  const void* x;
  int64_t rows, stride;
  Float type;
};

// out: [rows][weight rows] of the same type. The header must have been checked.
void linear(const Kernels& kernels, const Header& weight, const Given& given, void* out);

struct Product {
  const Header* weight;
  void* out;  // [rows][weight rows]
};

constexpr int64_t kRowsOfABatch = 512;  // that are made ready at once

// Rows, kRowsOfABatch at most, by each of several weights, in as few steps as they allow: weights of as many columns. own: a row for each
// of them, and no other is multiplied by it.
void linears(const Kernels& kernels, const Product* products, int count, const Given& given, Float out_type, bool own);

// Null, or what is wrong with `bytes` bytes as a packed weight.
const char* fault_of(const Header* weight, int64_t bytes);

}  // namespace qcore
