#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace qcore {
namespace {

// Of one linear layer among several.
struct Layered {
  const Header* weight;
  const float* bias;
  float* out;  // [rows][weight rows]
};

// Rows of a part of what a linear layer gave.
struct Part {
  float* first;
  int64_t stride;
  float* row(int64_t row) const { return first + row * stride; }
};

// An expert of a token's, and what its answer is multiplied by.
struct Chosen {
  int64_t expert, row;
  float weight;
};

// Where a token's keys and values go, and whether more than they is asked of it in the last layer.
struct Place {
  int64_t text, position;
  bool wanted;
};

struct Memory {
  std::vector<float> narrow_in, narrow_inner, narrow_scores, gathered;  // rooms for either type
  std::vector<float> looking, attended, inner, wide, mixed, parts, scores;
  std::vector<Product> products;
  std::vector<Chosen> chosen;
  std::vector<Layered> layered;
  std::vector<Place> places;
  std::vector<Attention> texts;
};

constexpr int64_t kRowsKept = 16;  // of each text, whose memory is kept from one call to the next

float* room(std::vector<float>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// Calls f(row) for each row.
template <class F>
void each_row(int64_t rows, F&& f) {
  parallel(rows, rows < 16 ? rows : 8, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) f(row);
  });
}

class Step {
 public:
  Step(const Kernels& kernels, const Stack& stack, Memory& memory) : kernels_(kernels), stack_(stack), memory_(memory) {}

  // out = W x + bias of each, x [rows][columns] being of the stack's type; own: as of `linears`.
  void multiply(const void* x, int64_t rows, const Layered* parts, int count, bool own = false) {
    memory_.products.resize(count);
    for (int i = 0; i < count; i++) memory_.products[i] = {parts[i].weight, parts[i].out};
    linears(kernels_, memory_.products.data(), count, {x, rows, parts->weight->columns, stack_.type}, Float::kF32, own);
    for (int i = 0; i < count; i++)
      if (parts[i].bias) {
        const int64_t columns = parts[i].weight->rows;
        each_row(rows, [&](int64_t row) { kernels_.add(parts[i].bias, 1, columns, parts[i].out + row * columns); });
      }
  }
  template <int size>
  void multiply(const void* x, int64_t rows, const Layered (&parts)[size], int count = size) { multiply(x, rows, static_cast<const Layered*>(parts), count); }

  // What a linear layer is given: rows of hidden, normalized where there is a norm.
  const void* ready(const float* hidden, int64_t rows, const float* norm) {
    char* const out = reinterpret_cast<char*>(room(memory_.narrow_in, rows * stack_.hidden));
    const int64_t bytes = stack_.hidden * width_of(stack_.type);
    each_row(rows, [&](int64_t row) { normalize(hidden + row * stack_.hidden, norm, stack_.hidden, stack_.type, out + row * bytes); });
    return out;
  }

  // hidden += what a block gave, memory_.wide, normalized where there is a norm.
  void add(float* hidden, int64_t rows, const float* norm) {
    each_row(rows, [&](int64_t row) {
      float* const x = memory_.wide.data() + row * stack_.hidden;
      if (norm) normalize(x, norm, stack_.hidden, Float::kF32, x);
      kernels_.add(x, 1, stack_.hidden, hidden + row * stack_.hidden);
    });
  }

  void normalize(const float* x, const float* norm, int64_t count, Float type, void* out) {
    kernels_.normalize(x, norm, count, static_cast<float>(stack_.norm_epsilon), type, out);
  }

  void keep(const float* head, const KvSide& side, int64_t number, void* row) {
    if (stack_.kept == Kept::kPlain) kernels_.narrow(head, stack_.type, stack_.head_dim, row);
    else kernels_.keep(head, side, stack_.kept, number, stack_.head_dim, row);
  }

  // Heads of one token.
  void rotate(float* heads, int64_t count, const float* norm, const float* cosines, const float* sines) {
    if (norm && stack_.joint_norms) normalize(heads, norm, count * stack_.head_dim, Float::kF32, heads);
    for (int64_t head = 0; head < count; head++) {
      float* const x = heads + head * stack_.head_dim;
      if (norm && !stack_.joint_norms) normalize(x, norm, stack_.head_dim, Float::kF32, x);
      if (cosines) kernels_.rotate(x, cosines, sines, stack_.rope_dim);
    }
  }

  // memory_.places of the tokens' rows.
  void find_places(const Tokens& tokens) {
    memory_.places.clear();
    for (int64_t text = 0; text < tokens.texts; text++) {
      const Text& one = tokens.each[text];
      for (int64_t row = 0; row < one.rows; row++) memory_.places.push_back({text, one.position + row, row >= one.rows - one.wanted});
    }
  }

  // memory_.attended = what tokens find: all of them, or those that are wanted; keys and values of all are put into the cache.
  void attend(const Layer& layer, const Tokens& tokens, int64_t number, const void* x, bool all_wanted) {
    const int64_t rows = static_cast<int64_t>(memory_.places.size()), query_size = stack_.heads * stack_.head_dim, key_size = stack_.kv_heads * stack_.head_dim;
    const int64_t heads_bytes = stack_.kv_heads * tokens.capacity * stack_.row_bytes, text_bytes = 2 * stack_.layers * heads_bytes;
    char* const keys = static_cast<char*>(tokens.cache) + 2 * number * heads_bytes;
    char* const values = keys + heads_bytes;
    float* const memory = room(memory_.looking, rows * (query_size + 2 * key_size));
    const bool apart = layer.key;
    const int64_t all = query_size + 2 * key_size;
    const Part query{memory, apart ? query_size : all};
    const Part key = apart ? Part{memory + rows * query_size, key_size} : Part{memory + query_size, all};
    const Part value = apart ? Part{key.first + rows * key_size, key_size} : Part{key.first + key_size, all};
    multiply(x, rows, {{layer.query, layer.query_bias, query.first}, {layer.key, layer.key_bias, key.first}, {layer.value, layer.value_bias, value.first}}, apart ? 3 : 1);
    const int64_t table = tokens.capacity * stack_.rope_dim;
    each_row(rows, [&](int64_t row) {
      const Place& place = memory_.places[row];
      const float* const cosines = layer.rope < 0 ? nullptr : tokens.rope + 2 * layer.rope * table + place.position * stack_.rope_dim;
      const float* const sines = cosines ? cosines + table : nullptr;
      if (all_wanted || place.wanted) rotate(query.row(row), stack_.heads, layer.query_norm, cosines, sines);
      rotate(key.row(row), stack_.kv_heads, layer.key_norm, cosines, sines);
      for (int64_t head = 0; head < stack_.kv_heads; head++) {
        const int64_t at = place.text * text_bytes + (head * tokens.capacity + place.position) * stack_.row_bytes, inside = head * stack_.head_dim;
        keep(key.row(row) + inside, layer.key_side, head, keys + at);
        keep(value.row(row) + inside, layer.value_side, head, values + at);
      }
    });
    Attention a{query.first, query.stride, rows, 0, layer.window, keys, values, layer.key_side, layer.value_side,
                stack_.kept, stack_.row_bytes, tokens.capacity, stack_.heads, stack_.kv_heads, stack_.head_dim, stack_.type,
                static_cast<float>(stack_.scale), static_cast<float>(stack_.softcap), nullptr, room(memory_.attended, rows * query_size)};
    find_texts(a, tokens, text_bytes, all_wanted);
    if (tokens.texts == 1 && memory_.texts[0].rows == 1) attend_one(memory_.texts[0]);
    else attend_texts();
  }

  // Row `row` of memory_.narrow_inner = activation(gate) * up, rows having as many columns.
  void activate(const float* gate, const float* up, int64_t columns, int64_t row) {
    void* const to = reinterpret_cast<char*>(memory_.narrow_inner.data()) + row * columns * width_of(stack_.type);
    kernels_.activate(gate, up, columns, static_cast<int64_t>(stack_.activation), stack_.type, to);
  }

  // An MLP's answers to x, which is normalized, into memory_.wide. No up: gate holds both.
  void perceptron(const Header* gate, const Header* up, const Header* down, const void* x, int64_t rows) {
    const int64_t inner = down->columns, stride = up ? inner : 2 * inner;
    float* const both = room(memory_.inner, 2 * inner * rows);
    float* const other = both + (up ? rows * inner : inner);
    multiply(x, rows, {{gate, nullptr, both}, {up, nullptr, other}}, up ? 2 : 1);
    room(memory_.narrow_inner, inner * rows);
    each_row(rows, [&](int64_t row) { activate(both + row * stride, other + row * stride, inner, row); });
    multiply(memory_.narrow_inner.data(), rows, {{down, nullptr, room(memory_.wide, rows * stack_.hidden)}});
  }

  // memory_.scores [rows][experts + 1]: of experts, in the stack's type where the model computes in it, then of the shared one.
  void score(const Mixture& m, const void* x, int64_t rows) {
    constexpr int64_t kAtOnce = 16;
    const int64_t parts = (m.experts + kAtOnce - 1) / kAtOnce, all = m.experts + 1;
    float* const scores = room(memory_.scores, rows * all);
    float* const given = room(memory_.inner, rows * stack_.hidden);
    kernels_.widen(x, stack_.type, rows * stack_.hidden, given);
    parallel(rows * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t expert = i % parts * kAtOnce, count = m.experts - expert < kAtOnce ? m.experts - expert : kAtOnce;
        kernels_.score(m.router + expert * stack_.hidden, count, given + i / parts * stack_.hidden, stack_.hidden, scores + i / parts * all + expert);
      }
    });
    for (int64_t row = 0; row < rows; row++) {
      float* const shared = scores + row * all + m.experts;
      *shared = 0;
      if (m.shared_router) kernels_.score(m.shared_router, 1, given + row * stack_.hidden, stack_.hidden, shared);
    }
    room(memory_.narrow_scores, rows * all);
    kernels_.narrow(scores, stack_.type, rows * all, memory_.narrow_scores.data());
    kernels_.widen(memory_.narrow_scores.data(), stack_.type, rows * all, scores);
  }

  // The experts that tokens have into memory_.chosen. What the shared one's answer is multiplied by is left behind a row's scores.
  void choose(const Mixture& m, const void* x, int64_t rows) {
    score(m, x, rows);
    memory_.chosen.clear();
    for (int64_t row = 0; row < rows; row++) {
      float *const scores = memory_.scores.data() + row * (m.experts + 1), *const end = scores + m.experts;
      *end = 1 / (1 + std::exp(-*end));
      const float most = *std::max_element(scores, end);
      float all = 0, kept = 0;
      for (float* score = scores; score < end; score++) all += *score = std::exp(*score - most);
      for (int64_t i = 0; i < m.chosen; i++) {
        float* const best = std::max_element(scores, end);
        memory_.chosen.push_back({best - scores, row, *best});
        kept += *best;
        *best = -1;
      }
      for (auto one = memory_.chosen.end() - m.chosen; one < memory_.chosen.end(); one++) one->weight /= m.normalized ? kept : all;
    }
  }

  // The sums of experts' answers into memory_.wide. Only the weights of those that are chosen are read.
  void mixture(const Mixture& m, const void* x, int64_t rows) {
    choose(m, x, rows);
    std::vector<float>& sum = memory_.mixed;
    sum.assign(rows * stack_.hidden, 0);
    if (m.shared_gate) {
      perceptron(m.shared_gate, m.shared_up, m.shared_down, x, rows);
      for (int64_t row = 0; row < rows; row++) add_answer(row, memory_.scores[row * (m.experts + 1) + m.experts], row);
    }
    if (rows == 1) experts_of_one(m, x);
    else experts_of_all(m, x);
    memory_.wide.swap(sum);
  }

  const Kernels& kernels_;
  const Stack& stack_;
  Memory& memory_;

 private:
  // memory_.texts. a: of all rows; keys and values of the first text.
  void find_texts(Attention a, const Tokens& tokens, int64_t text_bytes, bool all_wanted) {
    const int64_t out_bytes = a.heads * a.head_dim * width_of(a.type);
    memory_.texts.clear();
    int64_t parts = 0;
    for (int64_t text = 0; text < tokens.texts; text++) {
      const Text& given = tokens.each[text];
      Attention one = a;
      one.rows = all_wanted ? given.rows : given.wanted;
      const int64_t unwanted = given.rows - one.rows;
      one.queries += unwanted * a.stride, one.position = given.position + unwanted;
      if (one.rows == 1) parts += one.heads * one.spans() * one.part();
      memory_.texts.push_back(one);
      a.queries += given.rows * a.stride, a.out = static_cast<char*>(a.out) + one.rows * out_bytes;
      a.keys = static_cast<const char*>(a.keys) + text_bytes, a.values = static_cast<const char*>(a.values) + text_bytes;
    }
    float* part = room(memory_.parts, parts);
    for (Attention& one : memory_.texts)
      if (one.rows == 1) one.parts = part, part += one.heads * one.spans() * one.part();
  }

  // One query: threads share its spans.
  void attend_one(const Attention& a) {
    parallel(a.kv_heads * a.spans(), 1, [&](int64_t first, int64_t last) { kernels_.attend(a, first, last); });
    parallel(a.heads, a.spans() > 4 ? 1 : a.heads, [&](int64_t first, int64_t last) { kernels_.join(a, first, last); });
  }

  // Several queries, or several texts, whose heads threads share.
  void attend_texts() {
    const int64_t kv_heads = stack_.kv_heads;
    auto blocks_of = [&](const Attention& one) { return one.rows == 1 ? kv_heads : kv_heads * one.row_blocks(); };
    int64_t blocks = 0;
    for (const Attention& one : memory_.texts) blocks += blocks_of(one);
    parallel(blocks, 1, [&](int64_t first, int64_t last) {
      for (const Attention& one : memory_.texts) {
        const int64_t count = blocks_of(one), from = std::max<int64_t>(first, 0), to = std::min(last, count);
        for (int64_t head = from; one.rows == 1 && head < to; head++) {
          kernels_.attend(one, head * one.spans(), (head + 1) * one.spans());
          kernels_.join(one, head * one.share(), (head + 1) * one.share());
        }
        if (one.rows > 1 && from < to) kernels_.attend_rows(one, from, to);
        first -= count, last -= count;
      }
    });
  }

  // A row of memory_.mixed += a row of memory_.wide, times its weight.
  void add_answer(int64_t answer, float weight, int64_t row) {
    kernels_.add(memory_.wide.data() + answer * stack_.hidden, weight, stack_.hidden, memory_.mixed.data() + row * stack_.hidden);
  }

  // One token's experts, all at once.
  void experts_of_one(const Mixture& m, const void* x) {
    const int64_t inner = m.down[0]->columns, count = static_cast<int64_t>(memory_.chosen.size());
    float* const both = room(memory_.inner, 2 * inner * count);
    float* const answers = room(memory_.wide, stack_.hidden * count);
    memory_.layered.clear();
    for (int64_t i = 0; i < count; i++) {
      const int64_t expert = memory_.chosen[i].expert;
      memory_.layered.push_back({m.gate[expert], nullptr, both + 2 * inner * i});
      if (m.up) memory_.layered.push_back({m.up[expert], nullptr, both + 2 * inner * i + inner});
    }
    multiply(x, 1, memory_.layered.data(), static_cast<int>(memory_.layered.size()));
    room(memory_.narrow_inner, inner * count);
    memory_.layered.clear();
    for (int64_t i = 0; i < count; i++) {
      activate(both + 2 * inner * i, both + 2 * inner * i + inner, inner, i);
      memory_.layered.push_back({m.down[memory_.chosen[i].expert], nullptr, answers + stack_.hidden * i});
    }
    multiply(memory_.narrow_inner.data(), count, memory_.layered.data(), static_cast<int>(count), true);
    for (int64_t i = 0; i < count; i++) add_answer(i, memory_.chosen[i].weight, 0);
  }

  // Expert by expert, the tokens that have it.
  void experts_of_all(const Mixture& m, const void* x) {
    std::vector<Chosen>& chosen = memory_.chosen;
    std::stable_sort(chosen.begin(), chosen.end(), [](const Chosen& a, const Chosen& b) { return a.expert < b.expert; });
    const int64_t bytes = stack_.hidden * width_of(stack_.type);
    for (auto first = chosen.begin(), last = first; first < chosen.end(); first = last) {
      while (last < chosen.end() && last->expert == first->expert) last++;
      const int64_t count = last - first, expert = first->expert;
      char* const given = reinterpret_cast<char*>(room(memory_.gathered, count * stack_.hidden));
      for (int64_t i = 0; i < count; i++) std::memcpy(given + i * bytes, static_cast<const char*>(x) + first[i].row * bytes, bytes);
      perceptron(m.gate[expert], m.up ? m.up[expert] : nullptr, m.down[expert], given, count);
      for (int64_t i = 0; i < count; i++) add_answer(i, first[i].weight, first[i].row);
    }
  }
};

// The rows that are wanted behind all others; returns where they begin.
float* keep_wanted(const Stack& stack, const Tokens& tokens, float* end) {
  float *from = end, *to = end;
  for (int64_t text = tokens.texts - 1; text >= 0; text--) {
    const int64_t count = tokens.each[text].wanted * stack.hidden;
    std::memmove(to -= count, from - count, count * sizeof(float));
    from -= tokens.each[text].rows * stack.hidden;
  }
  return to;
}

void take(const Kernels& kernels, const Stack& stack, const Tokens& tokens) {
  static thread_local Memory memory;
  Step step(kernels, stack, memory);
  const Layer* const layers = reinterpret_cast<const Layer*>(&stack + 1);
  step.find_places(tokens);
  int64_t rows = static_cast<int64_t>(memory.places.size());
  const int64_t all = rows;
  float *hidden = tokens.hidden, *const end = hidden + rows * stack.hidden;
  for (int64_t l = 0; l < stack.layers; l++) {
    const Layer& layer = layers[l];
    const bool last = l == stack.layers - 1;
    const void* x = step.ready(hidden, rows, layer.input_norm);
    step.attend(layer, tokens, l, x, !last);
    if (last) hidden = keep_wanted(stack, tokens, end), rows = (end - hidden) / stack.hidden;
    step.multiply(memory.attended.data(), rows, {{layer.out, layer.out_bias, room(memory.wide, rows * stack.hidden)}});
    step.add(hidden, rows, layer.attention_norm);
    x = step.ready(hidden, rows, layer.mlp_norm);
    if (layer.mixture) step.mixture(*layer.mixture, x, rows);
    else step.perceptron(layer.gate, layer.up, layer.down, x, rows);
    step.add(hidden, rows, layer.output_norm);
  }
  each_row(rows, [&](int64_t row) { step.normalize(hidden + row * stack.hidden, stack.final_norm, stack.hidden, Float::kF32, hidden + row * stack.hidden); });
  if (all > kRowsKept * tokens.texts) memory = {};
}

}  // namespace

void decode(const Kernels& kernels, const Stack& stack, const Tokens& tokens) {
  with_team([&] { take(kernels, stack, tokens); });
}

}  // namespace qcore
