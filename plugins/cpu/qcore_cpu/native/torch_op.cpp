// The operators qcore_cpu::linear, look_up and decode, registered through torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h), whose
// functions are found in the process: one build serves every torch that has them (2.8 and later).
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "decoder.h"
#include "dispatch.h"
#include "linear.h"
#include "threads.h"

namespace {

using Error = int32_t;
using Tensor = void*;
using Value = uint64_t;  // StableIValue: an integer, or an owned tensor

struct Torch {
  Error (*library_fragment)(const char* space, const char* file, uint32_t line, void** library);
  Error (*library_impl_of)(const char* space, const char* key, const char* file, uint32_t line, void** library);
  Error (*define)(void* library, const char* schema);
  Error (*implement)(void* library, const char* name, void (*function)(Value*, uint64_t, uint64_t));
  Error (*data)(Tensor, void**);
  Error (*dim)(Tensor, int64_t*);
  Error (*numel)(Tensor, int64_t*);
  Error (*sizes)(Tensor, int64_t**);
  Error (*strides)(Tensor, int64_t**);
  Error (*dtype)(Tensor, int32_t*);
  Error (*empty)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, int32_t index, Tensor*);
  Error (*release)(Tensor);
  int32_t (*f32)();
  int32_t (*f16)();
  int32_t (*bf16)();
  int32_t (*u8)();
  int32_t (*i64)();
  int32_t (*cpu)();
} torch;
int32_t f32, f16, bf16, u8, i64, cpu;

void check(Error error, const char* what) {
  if (error) throw std::runtime_error(std::string("qcore_cpu: torch failed at ") + what);
}

struct Owned {
  Tensor tensor;
  ~Owned() { torch.release(tensor); }
};

qcore::Float type_of(int32_t dtype) {
  if (dtype == f32) return qcore::Float::kF32;
  if (dtype == bf16) return qcore::Float::kBF16;
  if (dtype == f16) return qcore::Float::kF16;
  throw std::runtime_error("qcore_cpu::linear takes float32, float16 and bfloat16");
}

const qcore::Kernels& kernels() {
  const qcore::Kernels* const found = qcore::chosen_kernels();
  if (!found) throw std::runtime_error("qcore_cpu: this processor has none of the instruction sets of the kernels");
  return *found;
}

// Memory of a tensor whose elements are of `dtype`, and how many there are.
void* memory_of(Tensor tensor, int32_t dtype, int64_t* count = nullptr) {
  void* memory;
  int32_t own;
  check(torch.data(tensor, &memory), "data_ptr");
  check(torch.dtype(tensor, &own), "dtype");
  if (own != dtype) throw std::runtime_error("qcore_cpu: a tensor has another type than the operator takes");
  if (count) check(torch.numel(tensor, count), "numel");
  return memory;
}

// A packed weight, checked.
const qcore::Header& weight_of(Tensor tensor) {
  int64_t bytes;
  const auto* const weight = static_cast<const qcore::Header*>(memory_of(tensor, u8, &bytes));
  if (const char* fault = qcore::fault_of(weight, bytes)) throw std::runtime_error(std::string("qcore_cpu: ") + fault);
  return *weight;
}

// linear(Tensor x, Tensor weight, int rows) -> Tensor; x: [..., K] with contiguous rows of one distance.
void linear(Value* stack, uint64_t, uint64_t) {
  const Owned x{reinterpret_cast<Tensor>(stack[0])}, packed{reinterpret_cast<Tensor>(stack[1])};
  const int64_t outputs = static_cast<int64_t>(stack[2]);
  void* from;
  int64_t dim, *sizes, *strides;
  int32_t dtype;
  check(torch.data(x.tensor, &from), "data_ptr");
  check(torch.dim(x.tensor, &dim), "dim");
  check(torch.sizes(x.tensor, &sizes), "sizes");
  check(torch.strides(x.tensor, &strides), "strides");
  check(torch.dtype(x.tensor, &dtype), "dtype");
  const qcore::Header& weight = weight_of(packed.tensor);
  if (dim < 1 || dim > 16 || sizes[dim - 1] != weight.columns || outputs != weight.rows)
    throw std::runtime_error("qcore_cpu::linear: x has " + std::to_string(dim < 1 ? 0 : sizes[dim - 1]) + " columns and " +
                             std::to_string(outputs) + " are wanted of a weight [" + std::to_string(weight.rows) + ", " +
                             std::to_string(weight.columns) + "]");
  int64_t rows = 1, shape[16], steps[16];
  for (int64_t i = 0; i < dim - 1; i++) rows *= shape[i] = sizes[i];
  shape[dim - 1] = outputs;
  for (int64_t i = dim - 1, step = 1; i >= 0; step *= shape[i--]) steps[i] = step;
  // Rows that follow each other at one distance need no copy.
  int64_t stride = dim > 1 ? strides[dim - 2] : 0, expected = stride;
  bool regular = sizes[dim - 1] <= 1 || strides[dim - 1] == 1;
  for (int64_t i = dim - 2; i >= 0; expected *= sizes[i--]) regular = regular && (sizes[i] == 1 || strides[i] == expected);
  if (!regular && rows) throw std::runtime_error("qcore_cpu::linear: rows of x must be contiguous, at one distance");
  const qcore::Float type = type_of(dtype);
  Tensor out;
  check(torch.empty(dim, shape, steps, dtype, cpu, 0, &out), "empty");
  void* to;
  if (rows) {
    try {
      check(torch.data(out, &to), "data_ptr");
      qcore::linear(kernels(), weight, {from, rows, stride, type}, to);
    } catch (...) {
      torch.release(out);
      throw;
    }
  }
  stack[0] = reinterpret_cast<Value>(out);
}

// look_up(Tensor tokens, Tensor weight, int columns) -> Tensor: int64 [...] -> float32 [..., columns].
void look_up(Value* stack, uint64_t, uint64_t) {
  const Owned tokens{reinterpret_cast<Tensor>(stack[0])}, packed{reinterpret_cast<Tensor>(stack[1])};
  const int64_t columns = static_cast<int64_t>(stack[2]);
  int64_t dim, count, *sizes, shape[17], steps[17];
  check(torch.dim(tokens.tensor, &dim), "dim");
  check(torch.sizes(tokens.tensor, &sizes), "sizes");
  const int64_t* const wanted = static_cast<const int64_t*>(memory_of(tokens.tensor, i64, &count));
  const qcore::Header& weight = weight_of(packed.tensor);
  if (dim > 16 || columns != weight.columns) throw std::runtime_error("qcore_cpu::look_up: tokens and weight do not go together");
  for (int64_t i = 0; i < dim; i++) shape[i] = sizes[i];
  shape[dim] = columns;
  for (int64_t i = dim, step = 1; i >= 0; step *= shape[i--]) steps[i] = step;
  for (int64_t i = 0; i < count; i++)
    if (wanted[i] < 0 || wanted[i] >= weight.rows)
      throw std::runtime_error("qcore_cpu::look_up: token " + std::to_string(wanted[i]) + " of " + std::to_string(weight.rows));
  Tensor out;
  check(torch.empty(dim + 1, shape, steps, f32, cpu, 0, &out), "empty");
  float* const to = count ? static_cast<float*>(memory_of(out, f32)) : nullptr;
  qcore::parallel(count, 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) kernels().look_up(weight, wanted[i], to + i * columns);
  });
  stack[0] = reinterpret_cast<Value>(out);
}

// decode(Tensor(a!) hidden, Tensor stack, Tensor(b!) cache, Tensor rope, Tensor texts, int capacity) -> (): see decoder.h; texts: int64 [texts][3], `Text`s.
void decode(Value* values, uint64_t, uint64_t) {
  const Owned hidden{reinterpret_cast<Tensor>(values[0])}, stack{reinterpret_cast<Tensor>(values[1])};
  const Owned cache{reinterpret_cast<Tensor>(values[2])}, rope{reinterpret_cast<Tensor>(values[3])}, given{reinterpret_cast<Tensor>(values[4])};
  const int64_t capacity = static_cast<int64_t>(values[5]);
  int64_t hidden_count, stack_bytes, cache_count, rope_count, numbers;
  float* const x = static_cast<float*>(memory_of(hidden.tensor, f32, &hidden_count));
  const auto* const plan = static_cast<const qcore::Stack*>(memory_of(stack.tensor, u8, &stack_bytes));
  const auto* const rotations = static_cast<const float*>(memory_of(rope.tensor, f32, &rope_count));
  const auto* const each = static_cast<const qcore::Text*>(memory_of(given.tensor, i64, &numbers));
  const bool whole = stack_bytes >= static_cast<int64_t>(sizeof(qcore::Stack)) &&
                     plan->size == stack_bytes && stack_bytes == static_cast<int64_t>(sizeof(qcore::Stack) + plan->layers * sizeof(qcore::Layer));
  if (!whole) throw std::runtime_error("qcore_cpu::decode: the stack is none");
  const int32_t types[] = {f32, f16, bf16};
  const bool plain = plan->kept == qcore::Kept::kPlain;
  void* const kept = memory_of(cache.tensor, plain ? types[static_cast<int64_t>(plan->type)] : u8, &cache_count);
  if (plain) cache_count *= qcore::width_of(plan->type);
  const auto* const layers = reinterpret_cast<const qcore::Layer*>(plan + 1);
  int64_t tables = 0;
  for (int64_t i = 0; i < plan->layers; i++) tables = layers[i].rope >= tables ? layers[i].rope + 1 : tables;
  const int64_t texts = numbers / 3, known = plan->layers * 2 * plan->kv_heads * capacity * plan->row_bytes;
  bool fits = numbers == 3 * texts && texts >= 1 && plan->hidden > 0 && cache_count == texts * known && rope_count >= tables * 2 * capacity * plan->rope_dim;
  int64_t rows = 0;
  for (int64_t i = 0; fits && i < texts; rows += each[i++].rows)
    fits = each[i].wanted >= 1 && each[i].wanted <= each[i].rows && each[i].rows <= qcore::kRowsOfABatch && each[i].position >= 0 && each[i].position <= capacity - each[i].rows;
  fits = fits && rows <= qcore::kRowsOfABatch && hidden_count == rows * plan->hidden;
  if (!fits) throw std::runtime_error("qcore_cpu::decode: hidden, stack, cache, rope and texts do not go together");
  qcore::decode(kernels(), *plan, {x, texts, each, kept, capacity, rotations});
}

}  // namespace

// Registers the operator. library: the path of libtorch_cpu.so, which must be loaded. Returns null, or what is missing.
QCORE_API const char* qcore_register(const char* library) {
  static std::string fault;
  void* const handle = dlopen(library, RTLD_NOLOAD | RTLD_NOW);
  if (!handle) return "torch is not loaded";
  const struct { void** place; const char* name; } functions[] = {
      {reinterpret_cast<void**>(&torch.library_fragment), "aoti_torch_library_init_fragment"},
      {reinterpret_cast<void**>(&torch.library_impl_of), "aoti_torch_library_init_impl"},
      {reinterpret_cast<void**>(&torch.define), "aoti_torch_library_def"},
      {reinterpret_cast<void**>(&torch.implement), "aoti_torch_library_impl"},
      {reinterpret_cast<void**>(&torch.data), "aoti_torch_get_data_ptr"},
      {reinterpret_cast<void**>(&torch.dim), "aoti_torch_get_dim"},
      {reinterpret_cast<void**>(&torch.numel), "aoti_torch_get_numel"},
      {reinterpret_cast<void**>(&torch.sizes), "aoti_torch_get_sizes"},
      {reinterpret_cast<void**>(&torch.strides), "aoti_torch_get_strides"},
      {reinterpret_cast<void**>(&torch.dtype), "aoti_torch_get_dtype"},
      {reinterpret_cast<void**>(&torch.empty), "aoti_torch_empty_strided"},
      {reinterpret_cast<void**>(&torch.release), "aoti_torch_delete_tensor_object"},
      {reinterpret_cast<void**>(&torch.f32), "aoti_torch_dtype_float32"},
      {reinterpret_cast<void**>(&torch.f16), "aoti_torch_dtype_float16"},
      {reinterpret_cast<void**>(&torch.bf16), "aoti_torch_dtype_bfloat16"},
      {reinterpret_cast<void**>(&torch.u8), "aoti_torch_dtype_uint8"},
      {reinterpret_cast<void**>(&torch.i64), "aoti_torch_dtype_int64"},
      {reinterpret_cast<void**>(&torch.cpu), "aoti_torch_device_type_cpu"},
  };
  for (const auto& function : functions) {
    *function.place = dlsym(handle, function.name);
    if (!*function.place) return (fault = std::string("torch has no ") + function.name).c_str();
  }
  f32 = torch.f32(), f16 = torch.f16(), bf16 = torch.bf16(), u8 = torch.u8(), i64 = torch.i64(), cpu = torch.cpu();
  qcore::find_threads(handle);
  void *fragment, *implementations;  // kept for ever: releasing them would take the operator back
  if (torch.library_fragment("qcore_cpu", "", 0, &fragment) || torch.define(fragment, "linear(Tensor x, Tensor weight, int rows) -> Tensor") ||
      torch.library_impl_of("qcore_cpu", "CPU", "", 0, &implementations) || torch.implement(implementations, "linear", linear) ||
      torch.define(fragment, "look_up(Tensor tokens, Tensor weight, int columns) -> Tensor") ||
      torch.implement(implementations, "look_up", look_up) ||
      torch.define(fragment, "decode(Tensor(a!) hidden, Tensor stack, Tensor(b!) cache, Tensor rope, Tensor texts, int capacity) -> ()") ||
      torch.implement(implementations, "decode", decode))
    return "torch did not take the operator";
  return nullptr;
}

// Whether the operators share torch's threads; else they run on one.
QCORE_API int qcore_has_threads() { return qcore::has_threads(); }
