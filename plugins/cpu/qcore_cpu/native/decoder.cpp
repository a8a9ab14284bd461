#include "decoder.h"

#include <cmath>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace qcore {
namespace {

struct Memory {
  std::vector<float> narrow_in, narrow_out;  // rooms for either type
  std::vector<float> query, key, value, attended, gate, up, wide, parts;
};

class Step {
 public:
  Step(const Kernels& kernels, const Stack& stack, Memory& memory) : kernels_(kernels), stack_(stack), memory_(memory) {}

  struct Layered {
    const Header* weight;
    const float* bias;
    std::vector<float>& out;
  };

  // out = W x + bias of each, x being of the stack's type.
  template <int count>
  void multiply(const void* x, const Layered (&parts)[count]) {
    Product products[count];
    int64_t cells = 0;
    for (const Layered& part : parts) cells += part.weight->rows;
    memory_.narrow_out.resize(cells);
    const bool wide = stack_.type == Float::kF32;
    char* room = reinterpret_cast<char*>(memory_.narrow_out.data());
    for (int i = 0; i < count; i++) {
      const int64_t rows = parts[i].weight->rows;
      parts[i].out.resize(rows);
      products[i] = {parts[i].weight, wide ? static_cast<void*>(parts[i].out.data()) : room};
      room += rows * width_of(stack_.type);
    }
    linears(kernels_, products, count, x, stack_.type);
    for (int i = 0; i < count; i++) {
      const int64_t rows = parts[i].weight->rows;
      float* const out = parts[i].out.data();
      if (!wide) kernels_.widen(products[i].out, stack_.type, rows, out);
      if (parts[i].bias)
        for (int64_t k = 0; k < rows; k++) out[k] += parts[i].bias[k];
    }
  }

  // What a linear layer is given: x, normalized where there is a norm.
  const void* ready(const float* x, const float* norm, int64_t count) {
    memory_.narrow_in.resize(count);
    kernels_.normalize(x, norm, count, static_cast<float>(stack_.norm_epsilon), stack_.type, memory_.narrow_in.data());
    return memory_.narrow_in.data();
  }

  void add(float* hidden, std::vector<float>& x, const float* norm) {
    if (norm) kernels_.normalize(x.data(), norm, stack_.hidden, static_cast<float>(stack_.norm_epsilon), Float::kF32, x.data());
    for (int64_t i = 0; i < stack_.hidden; i++) hidden[i] += x[i];
  }

  void keep(const std::vector<float>& heads, const KvSide& side, int64_t head, void* row) {
    const float* const from = heads.data() + head * stack_.head_dim;
    if (stack_.kept == Kept::kPlain) kernels_.narrow(from, stack_.type, stack_.head_dim, row);
    else kernels_.keep(from, side, stack_.kept, head, stack_.head_dim, row);
  }

  void rotate(std::vector<float>& heads, int64_t count, const float* norm, const float* cosines, const float* sines) {
    for (int64_t head = 0; head < count; head++) {
      float* const x = heads.data() + head * stack_.head_dim;
      if (norm) kernels_.normalize(x, norm, stack_.head_dim, static_cast<float>(stack_.norm_epsilon), Float::kF32, x);
      if (!cosines) continue;
      const int64_t half = stack_.rope_dim / 2;
      for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
      }
    }
  }

  const Kernels& kernels_;
  const Stack& stack_;
  Memory& memory_;
};

void take_step(const Kernels& kernels, const Stack& stack, float* hidden, void* cache, int64_t capacity, const float* rope, int64_t position) {
  static thread_local Memory memory;
  Step step(kernels, stack, memory);
  const Layer* const layers = reinterpret_cast<const Layer*>(&stack + 1);
  const int64_t heads_bytes = stack.kv_heads * capacity * stack.row_bytes;
  memory.attended.resize(stack.heads * stack.head_dim);
  for (int64_t l = 0; l < stack.layers; l++) {
    const Layer& layer = layers[l];
    char* const keys = static_cast<char*>(cache) + 2 * l * heads_bytes;
    char* const values = keys + heads_bytes;
    const void* x = step.ready(hidden, layer.input_norm, stack.hidden);
    step.multiply(x, {{layer.query, layer.query_bias, memory.query}, {layer.key, layer.key_bias, memory.key}, {layer.value, layer.value_bias, memory.value}});
    const float* const cosines = layer.rope < 0 ? nullptr : rope + (2 * layer.rope * capacity + position) * stack.rope_dim;
    const float* const sines = cosines + (cosines ? capacity * stack.rope_dim : 0);
    step.rotate(memory.query, stack.heads, layer.query_norm, cosines, sines);
    step.rotate(memory.key, stack.kv_heads, layer.key_norm, cosines, sines);
    for (int64_t head = 0; head < stack.kv_heads; head++) {
      const int64_t place = (head * capacity + position) * stack.row_bytes;
      step.keep(memory.key, layer.key_side, head, keys + place);
      step.keep(memory.value, layer.value_side, head, values + place);
    }
    const int64_t first = layer.window && position + 1 > layer.window ? position + 1 - layer.window : 0;
    Attention attention{memory.query.data(), keys, values, layer.key_side, layer.value_side, stack.kept, stack.row_bytes, capacity, first, position + 1, stack.heads, stack.kv_heads, stack.head_dim, stack.type,
                        static_cast<float>(stack.scale), static_cast<float>(stack.softcap), nullptr, memory.attended.data()};
    const int64_t spans = attention.spans();
    memory.parts.resize(stack.heads * spans * attention.part());
    attention.parts = memory.parts.data();
    parallel(stack.kv_heads * spans, 1, [&](int64_t from, int64_t to) { kernels.attend(attention, from, to); });
    parallel(stack.heads, spans > 4 ? 1 : stack.heads, [&](int64_t from, int64_t to) { kernels.join(attention, from, to); });
    step.multiply(memory.attended.data(), {{layer.out, layer.out_bias, memory.wide}});
    step.add(hidden, memory.wide, layer.attention_norm);
    x = step.ready(hidden, layer.mlp_norm, stack.hidden);
    step.multiply(x, {{layer.gate, nullptr, memory.gate}, {layer.up, nullptr, memory.up}});
    memory.narrow_in.resize(layer.gate->rows);
    kernels.activate(memory.gate.data(), memory.up.data(), layer.gate->rows, static_cast<int64_t>(stack.activation), stack.type, memory.narrow_in.data());
    step.multiply(memory.narrow_in.data(), {{layer.down, nullptr, memory.wide}});
    step.add(hidden, memory.wide, layer.output_norm);
  }
  kernels.normalize(hidden, stack.final_norm, stack.hidden, static_cast<float>(stack.norm_epsilon), Float::kF32, hidden);
}

}  // namespace

void decode(const Kernels& kernels, const Stack& stack, float* hidden, void* cache, int64_t capacity, const float* rope, int64_t position) {
  with_team([&] { take_step(kernels, stack, hidden, cache, capacity, rope, position); });
}

}  // namespace qcore
