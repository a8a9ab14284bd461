// Tokens through a stack of decoder layers: what stands around the linear layers, without a framework between them.
#pragma once
#include "kernels.h"

namespace qcore {

enum class Activation : int64_t { kSilu = 0, kGeluTanh };

// What keys and values are kept in: the stack's type, or codes of a byte.
enum class Kept : int64_t { kPlain = 0, kInt8, kE4M3, kE5M2 };

// How they become codes: [kv_heads] each. No scale: one for each row, a float32 behind its codes. inverse: what is multiplied by instead
// of dividing by the scale, where a tool does so.
struct KvSide {
  const float *scale, *zero, *inverse;
};

// Experts in the place of an MLP: a token has `chosen` of them, whose answers are weighed by the softmax of the router's scores.
struct Mixture {  // every field has 8 bytes
  int64_t experts, chosen;
  int64_t normalized;                        // whether the weights of those that are chosen are made to sum to 1
  const float* router;                       // [experts][hidden]
  const Header *const *gate, *const *up, *const *down;  // [experts]
  const Header *shared_gate, *shared_up, *shared_down;  // of an expert that every token has; null, with its router: there is none
  const float* shared_router;                // [hidden]: its weight is the sigmoid of this score
};

struct Layer {  // every field has 8 bytes; pointers are null where a model has no such part
  const float *input_norm, *query_norm, *key_norm, *attention_norm, *mlp_norm, *output_norm;  // [hidden]; of queries and keys [head_dim], or as Stack::joint_norms says
  const Header *query, *key, *value, *out, *gate, *up, *down;  // no key and value: query holds all three, one below the other; no up: gate holds both
  const float *query_bias, *key_bias, *value_bias, *out_bias;
  KvSide key_side, value_side;
  int64_t window;  // tokens that attention looks back on; 0: all
  int64_t rope;    // which table of positions; -1: none
  const Mixture* mixture;  // instead of gate, up and down
};

struct Stack {
  int64_t size;        // bytes of the stack and its layers, which follow it
  int64_t layers, hidden, heads, kv_heads, head_dim, rope_dim;
  Activation activation;
  Float type;          // of what the linear layers are given, and of keys and values
  double norm_epsilon, scale, softcap;  // softcap: of attention scores; 0: none
  const float* final_norm;
  Kept kept;
  int64_t row_bytes;   // of a key or value of one head
  int64_t joint_norms;  // whether queries are normalized all heads together, and so keys; else each head
};
static_assert(sizeof(Layer) == 26 * 8 && sizeof(Stack) == 16 * 8 && sizeof(Mixture) == 11 * 8);

constexpr int64_t kAttentionSpan = 128;  // positions that are looked at together

constexpr int64_t kAttentionLanes = 192;  // queries that look at a span of many tokens' together

// Queries of some tokens in a row against the keys and values of a layer, their own among them.
struct Attention {
  const float* queries;   // [rows][heads][head_dim], rows `stride` apart; rotated
  int64_t stride, rows;
  int64_t position;       // of the first token
  int64_t window;         // as Layer::window
  const void *keys, *values;  // [kv_heads][capacity][row_bytes]
  KvSide key_side, value_side;
  Kept kept;
  int64_t row_bytes, capacity;
  int64_t heads, kv_heads, head_dim;
  Float type;
  float scale, softcap;
  float* parts;           // of one row: [heads][spans][head_dim + 2]: sums of values, the greatest score, the sum of chances
  void* out;              // [rows][heads][head_dim], of `type`

  // Positions first .. last - 1 are looked at.
  int64_t first(int64_t row) const { return window && last(row) > window ? last(row) - window : 0; }
  int64_t last(int64_t row) const { return position + row + 1; }
  int64_t share() const { return heads / kv_heads; }
  // What one row is cut into, and several.
  int64_t spans() const { return (last(0) - first(0) + kAttentionSpan - 1) / kAttentionSpan; }
  int64_t part() const { return head_dim + 2; }
  int64_t rows_of_block() const { return share() < kAttentionLanes ? kAttentionLanes / share() : 1; }
  int64_t row_blocks() const { return (rows + rows_of_block() - 1) / rows_of_block(); }
};

// The next tokens of a text, in a row.
struct Text {  // every field has 8 bytes
  int64_t position;      // of the first
  int64_t rows, wanted;  // how many, and how many of the last are wanted: one at least
};

// Tokens of texts, one text's behind the other's; kRowsOfABatch at most.
struct Tokens {
  float* hidden;      // [rows][hidden], in place: their embeddings; as many of the last rows as are wanted become the last layer's output, after the final norm
  int64_t texts;
  const Text* each;   // [texts]
  void* cache;        // [texts][layers][2][kv_heads][capacity][row_bytes], which holds the positions before and gets these
  int64_t capacity;
  const float* rope;  // [tables][2][capacity][rope_dim], cosines and sines
};
void decode(const Kernels& kernels, const Stack& stack, const Tokens& tokens);

}  // namespace qcore
