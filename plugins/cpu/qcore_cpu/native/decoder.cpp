#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace qcore {
namespace {

// Of one linear layer among several that are given the same.
struct Layered {
  const Header* weight;
  const float* bias;
  float* out;
};

// An expert, and what its answer is multiplied by.
struct Chosen {
  int64_t expert;
  float weight;
};

struct Memory {
  std::vector<float> narrow_in, narrow_inner, narrow_out;  // rooms for either type
  std::vector<float> looking, attended, inner, wide, mixed, parts, scores;
  std::vector<Product> products;
  std::vector<Chosen> chosen;
  std::vector<Layered> layered;
};

float* room(std::vector<float>& memory, int64_t count) {
  memory.resize(count);
  return memory.data();
}

class Step {
 public:
  Step(const Kernels& kernels, const Stack& stack, Memory& memory) : kernels_(kernels), stack_(stack), memory_(memory) {}

  // out = W x + bias of each, x being of the stack's type; stride: as of `linears`.
  void multiply(const void* x, const Layered* parts, int count, int64_t stride = 0) {
    memory_.products.resize(count);
    int64_t cells = 0;
    for (int i = 0; i < count; i++) cells += parts[i].weight->rows;
    memory_.narrow_out.resize(cells);
    const bool wide = stack_.type == Float::kF32;
    char* to = reinterpret_cast<char*>(memory_.narrow_out.data());
    for (int i = 0; i < count; i++) {
      memory_.products[i] = {parts[i].weight, wide ? static_cast<void*>(parts[i].out) : to};
      to += parts[i].weight->rows * width_of(stack_.type);
    }
    linears(kernels_, memory_.products.data(), count, x, stride, stack_.type);
    for (int i = 0; i < count; i++) {
      const int64_t rows = parts[i].weight->rows;
      if (!wide) kernels_.widen(memory_.products[i].out, stack_.type, rows, parts[i].out);
      if (parts[i].bias)
        for (int64_t k = 0; k < rows; k++) parts[i].out[k] += parts[i].bias[k];
    }
  }
  template <int size>
  void multiply(const void* x, const Layered (&parts)[size], int count = size) { multiply(x, static_cast<const Layered*>(parts), count); }

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

  void keep(const float* heads, const KvSide& side, int64_t head, void* row) {
    const float* const from = heads + head * stack_.head_dim;
    if (stack_.kept == Kept::kPlain) kernels_.narrow(from, stack_.type, stack_.head_dim, row);
    else kernels_.keep(from, side, stack_.kept, head, stack_.head_dim, row);
  }

  void rotate(float* heads, int64_t count, const float* norm, const float* cosines, const float* sines) {
    if (norm && stack_.joint_norms) kernels_.normalize(heads, norm, count * stack_.head_dim, static_cast<float>(stack_.norm_epsilon), Float::kF32, heads);
    for (int64_t head = 0; head < count; head++) {
      float* const x = heads + head * stack_.head_dim;
      if (norm && !stack_.joint_norms) kernels_.normalize(x, norm, stack_.head_dim, static_cast<float>(stack_.norm_epsilon), Float::kF32, x);
      if (!cosines) continue;
      const int64_t half = stack_.rope_dim / 2;
      for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[i + half];
        x[i] = low * cosines[i] - high * sines[i];
        x[i + half] = high * cosines[i + half] + low * sines[i + half];
      }
    }
  }

  // Row `row` of memory_.narrow_inner = activation(gate) * up, rows having as many columns.
  void activate(const float* gate, const float* up, int64_t columns, int64_t row) {
    void* const to = reinterpret_cast<char*>(memory_.narrow_inner.data()) + row * columns * width_of(stack_.type);
    kernels_.activate(gate, up, columns, static_cast<int64_t>(stack_.activation), stack_.type, to);
  }

  // An MLP's answer to x, which is normalized, into memory_.wide. No up: gate holds both.
  void perceptron(const Header* gate, const Header* up, const Header* down, const void* x) {
    const int64_t inner = down->columns;
    float* const both = room(memory_.inner, 2 * inner);
    multiply(x, {{gate, nullptr, both}, {up, nullptr, both + inner}}, up ? 2 : 1);
    room(memory_.narrow_inner, inner);
    activate(both, both + inner, inner, 0);
    multiply(memory_.narrow_inner.data(), {{down, nullptr, room(memory_.wide, stack_.hidden)}});
  }

  // memory_.scores = scores of experts, which are in the stack's type where the model computes in it, then of the shared one.
  void score(const Mixture& m, const void* x) {
    float* const scores = room(memory_.scores, m.experts + 1);
    float* const given = room(memory_.inner, stack_.hidden);
    kernels_.widen(x, stack_.type, stack_.hidden, given);
    parallel(m.experts, in_team() ? 16 : m.experts, [&](int64_t from, int64_t to) {
      kernels_.score(m.router + from * stack_.hidden, to - from, given, stack_.hidden, scores + from);
    });
    scores[m.experts] = 0;
    if (m.shared_router) kernels_.score(m.shared_router, 1, given, stack_.hidden, scores + m.experts);
    memory_.narrow_out.resize(m.experts + 1);
    kernels_.narrow(scores, stack_.type, m.experts + 1, memory_.narrow_out.data());
    kernels_.widen(memory_.narrow_out.data(), stack_.type, m.experts + 1, scores);
  }

  // The experts that a token has. Returns what the shared one's answer is multiplied by.
  float choose(const Mixture& m, const void* x) {
    score(m, x);
    std::vector<float>& scores = memory_.scores;
    const float shared = 1 / (1 + std::exp(-scores[m.experts]));
    scores.pop_back();
    const float most = *std::max_element(scores.begin(), scores.end());
    float all = 0, kept = 0;
    for (float& score : scores) all += score = std::exp(score - most);
    memory_.chosen.clear();
    for (int64_t i = 0; i < m.chosen; i++) {
      const int64_t expert = std::max_element(scores.begin(), scores.end()) - scores.begin();
      memory_.chosen.push_back({expert, scores[expert]});
      kept += scores[expert];
      scores[expert] = -1;
    }
    for (Chosen& one : memory_.chosen) one.weight /= m.normalized ? kept : all;
    return shared;
  }

  // The sum of experts' answers into memory_.wide. Only the weights of those that are chosen are read.
  void mixture(const Mixture& m, const void* x) {
    const float shared = choose(m, x);
    std::vector<float>& sum = memory_.mixed;
    sum.assign(stack_.hidden, 0);
    if (m.shared_gate) {
      perceptron(m.shared_gate, m.shared_up, m.shared_down, x);
      for (int64_t i = 0; i < stack_.hidden; i++) sum[i] = shared * memory_.wide[i];
    }
    const int64_t inner = m.down[0]->columns, count = static_cast<int64_t>(memory_.chosen.size());
    float* const both = room(memory_.inner, 2 * inner * count);
    float* const answers = room(memory_.wide, stack_.hidden * count);
    memory_.layered.clear();
    for (int64_t i = 0; i < count; i++) {
      const int64_t expert = memory_.chosen[i].expert;
      memory_.layered.push_back({m.gate[expert], nullptr, both + 2 * inner * i});
      if (m.up) memory_.layered.push_back({m.up[expert], nullptr, both + 2 * inner * i + inner});
    }
    multiply(x, memory_.layered.data(), static_cast<int>(memory_.layered.size()));
    room(memory_.narrow_inner, inner * count);
    memory_.layered.clear();
    for (int64_t i = 0; i < count; i++) {
      activate(both + 2 * inner * i, both + 2 * inner * i + inner, inner, i);
      memory_.layered.push_back({m.down[memory_.chosen[i].expert], nullptr, answers + stack_.hidden * i});
    }
    multiply(memory_.narrow_inner.data(), memory_.layered.data(), static_cast<int>(count), inner);
    for (int64_t i = 0; i < count; i++)
      for (int64_t k = 0; k < stack_.hidden; k++) sum[k] += memory_.chosen[i].weight * answers[stack_.hidden * i + k];
    memory_.wide.swap(sum);
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
    float* const query = room(memory.looking, (stack.heads + 2 * stack.kv_heads) * stack.head_dim);
    float *const key = query + stack.heads * stack.head_dim, *const value = key + stack.kv_heads * stack.head_dim;
    step.multiply(x, {{layer.query, layer.query_bias, query}, {layer.key, layer.key_bias, key}, {layer.value, layer.value_bias, value}}, layer.key ? 3 : 1);
    const float* const cosines = layer.rope < 0 ? nullptr : rope + (2 * layer.rope * capacity + position) * stack.rope_dim;
    const float* const sines = cosines + (cosines ? capacity * stack.rope_dim : 0);
    step.rotate(query, stack.heads, layer.query_norm, cosines, sines);
    step.rotate(key, stack.kv_heads, layer.key_norm, cosines, sines);
    for (int64_t head = 0; head < stack.kv_heads; head++) {
      const int64_t place = (head * capacity + position) * stack.row_bytes;
      step.keep(key, layer.key_side, head, keys + place);
      step.keep(value, layer.value_side, head, values + place);
    }
    const int64_t first = layer.window && position + 1 > layer.window ? position + 1 - layer.window : 0;
    Attention attention{query, keys, values, layer.key_side, layer.value_side, stack.kept, stack.row_bytes, capacity, first, position + 1, stack.heads, stack.kv_heads, stack.head_dim, stack.type,
                        static_cast<float>(stack.scale), static_cast<float>(stack.softcap), nullptr, memory.attended.data()};
    const int64_t spans = attention.spans();
    memory.parts.resize(stack.heads * spans * attention.part());
    attention.parts = memory.parts.data();
    parallel(stack.kv_heads * spans, 1, [&](int64_t from, int64_t to) { kernels.attend(attention, from, to); });
    parallel(stack.heads, spans > 4 ? 1 : stack.heads, [&](int64_t from, int64_t to) { kernels.join(attention, from, to); });
    step.multiply(memory.attended.data(), {{layer.out, layer.out_bias, room(memory.wide, stack.hidden)}});
    step.add(hidden, memory.wide, layer.attention_norm);
    x = step.ready(hidden, layer.mlp_norm, stack.hidden);
    if (layer.mixture) step.mixture(*layer.mixture, x);
    else step.perceptron(layer.gate, layer.up, layer.down, x);
    step.add(hidden, memory.wide, layer.output_norm);
  }
  kernels.normalize(hidden, stack.final_norm, stack.hidden, static_cast<float>(stack.norm_epsilon), Float::kF32, hidden);
}

}  // namespace

void decode(const Kernels& kernels, const Stack& stack, float* hidden, void* cache, int64_t capacity, const float* rope, int64_t position) {
  with_team([&] { take_step(kernels, stack, hidden, cache, capacity, rope, position); });
}

}  // namespace qcore
