// Masked cross-attention on CPU, backward; compiled once per instruction set, as part of cpu_kernel.cpp.
//
// A task owns a range of keys and a group of heads. It alone writes their gradients, once. Its part of the query
// gradients goes into a buffer of its own, and the parts are summed in order. So there are no atomics, and every run
// gives the same bits. Weights are computed again from the saved log-sum-exp. For each tile the task computes weights
// and score gradients of up to kChunk queries (24 KiB, in L1). From these it computes the query gradients, a few query
// rows at a time in registers, and the key and value gradients, a few key rows at a time.
#pragma once

#include "masked_attention/cpu_bias.h"
#include "masked_attention/cpu_tiles.h"

namespace m2f {
namespace {

constexpr int kChunk = 8 * kRows;
// The number of keys whose gradients are accumulated in registers at once.
constexpr int kKeyRows = kVectorBytes == 64 ? 8 : 4;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// One head's queries.
struct BackwardHead {
  float *query, *grad_output, *delta, *logsumexp;
  HeadBias bias;
  // Results of the head.
  float* grad_query;  // [Q][padded(D)]
  HeadBias grad_bias;

  BackwardHead(const MaskedAttentionArgs& args, Pieces& pieces, Pieces& results)
      : query(pieces.take<float>(args.queries * padded(args.channels))),
        grad_output(pieces.take<float>(args.queries * padded(args.channels))),
        delta(pieces.take<float>(args.queries)),
        logsumexp(pieces.take<float>(args.queries)),
        bias(args, pieces),
        grad_query(results.take<float>(args.queries * padded(args.channels))),
        grad_bias(args, results) {}
};

struct BackwardMemory {
  ActiveQueries active;
  float *key, *key_columns, *value_columns, *grad_key, *grad_value;
  float *weights, *grad_scores;  // [kChunk][kTile]
  float* bias_row;

  BackwardMemory(const MaskedAttentionArgs& args, Pieces& pieces) {
    active = ActiveQueries::take(pieces, args);
    for (float** tile : {&key, &key_columns, &value_columns, &grad_key, &grad_value})
      *tile = pieces.take<float>(kTile * padded(args.channels));
    for (float** chunk : {&weights, &grad_scores}) *chunk = pieces.take<float>(kChunk * kTile);
    bias_row = pieces.take<float>(bias_row_scratch(args));
  }
};

int64_t backward_partial(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr}, results{nullptr};
  BackwardHead head(args, pieces, results);
  return static_cast<int64_t>(results.used / sizeof(float));
}

size_t backward_head_bytes(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr};
  BackwardHead head(args, pieces, pieces);
  return pieces.used;
}

BackwardHead backward_head_of(const MaskedAttentionArgs& args, const Task& task, int64_t h, Pieces pieces,
                              size_t head_bytes) {
  pieces.used += (h - task.first_head) * head_bytes;
  if (args.parts == 1) return BackwardHead(args, pieces, pieces);
  const int64_t index = (task.n * args.heads + h) * args.parts + task.part;
  Pieces results{reinterpret_cast<char*>(args.partial + index * backward_partial(args))};
  return BackwardHead(args, pieces, results);
}

size_t backward_scratch(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr};
  BackwardMemory memory(args, pieces);
  return pieces.used + most_heads(args) * backward_head_bytes(args);
}

// The queries of a chunk, in the order of their rows in `weights`: those with bits in both words, in the first only, in
// the second only.
struct Chunk {
  int32_t index[kChunk];
  int count[3] = {};
  int size() const { return count[0] + count[1] + count[2]; }
};

// Computes weights and score gradients of one group, and adds its part of the query gradients.
template <int kR>
void backward_group(const MaskedAttentionArgs& args, const BackwardMemory& m, const BackwardHead& head,
                    const BiasTile& bias, bool finite, int first, int words, const int32_t* index, float* weights,
                    float* grad_scores) {
  const int64_t d = padded(args.channels);
  scores<kR>(head.query, d, index, m.key_columns, args.channels, first, words, weights);
  if (biased(args)) add_bias<kR>(args, head.bias, bias, first, words, index, weights);
  scores<kR>(head.grad_output, d, index, m.value_columns, args.channels, first, words, grad_scores);
  for (int r = 0; r < kR; ++r) {
    const int64_t q = index[r];
    const FloatVec shift = splat<float>(head.logsumexp[q]), delta = splat<float>(head.delta[q]);
    for (int k = first * kWord; k < (first + words) * kWord; k += kFloatLanes) {
      const uint32_t bits = m.active.bits[q * kWords + k / kWord] >> (k % kWord);
      float *weight = weights + r * kTile + k, *gradient = grad_scores + r * kTile + k;
      const FloatVec exponent = load(weight) - shift;
      // No weight exceeds 1; with scores so large that their rounding errors do, one would overflow.
      const FloatVec p = select_bits(bits, exp2(exponent > 0.0f ? FloatVec{} : exponent), FloatVec{});
      store(weight, p);
      store(gradient, select_bits(bits, p * (load(gradient) - delta), FloatVec{}));
    }
  }
  if (biased(args)) add_bias_gradients<kR>(args, head.grad_bias, bias, first, words, index, grad_scores);
  if (__builtin_expect(finite, 1)) {
    accumulate_rows<kR>(grad_scores, m.key, d, first * kWord, (first + words) * kWord, index, nullptr, head.grad_query);
    return;
  }
  for (int r = 0; r < kR; ++r)
    accumulate_attended(grad_scores + r * kTile, m.active.bits + index[r] * kWords, m.key, d, 1.0f,
                        head.grad_query + index[r] * d);
}

// sum[k][:] += sum over i in [first, last) of weights[i][k] * rows[index[i]][:], for kKeyRows keys.
template <int kVectors>
M2F_INLINE void accumulate_keys(const float* weights, const float* rows, int64_t stride, const int32_t* index,
                                int first, int last, float* sum) {
  FloatVec total[kKeyRows][kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kKeyRows; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) total[k][v] = load(sum + k * stride + v * kFloatLanes);
  for (int i = first; i < last; ++i) {
    const float *row = rows + index[i] * stride, *weight = weights + i * kTile;
    FloatVec b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = load(row + v * kFloatLanes);
#pragma GCC unroll 8
    for (int k = 0; k < kKeyRows; ++k)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[k][v] = fused(splat<float>(weight[k]), b[v], total[k][v]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kKeyRows; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sum + k * stride + v * kFloatLanes, total[k][v]);
}

void accumulate_word(const float* weights, const float* rows, int64_t stride, const Chunk& chunk, int word, int first,
                     int last, float* sum) {
  if (first == last) return;
  for (int k = word * kWord; k < (word + 1) * kWord; k += kKeyRows) {
    int64_t c = 0;
    for (; c + 2 * kFloatLanes <= stride; c += 2 * kFloatLanes)
      accumulate_keys<2>(weights + k, rows + c, stride, chunk.index, first, last, sum + k * stride + c);
    if (c < stride) accumulate_keys<1>(weights + k, rows + c, stride, chunk.index, first, last, sum + k * stride + c);
  }
}

// Adds a finished chunk's part of the key and value gradients.
void accumulate_chunk(const MaskedAttentionArgs& args, const BackwardMemory& m, const BackwardHead& head,
                      const Chunk& chunk) {
  const int64_t d = padded(args.channels);
  const int both = chunk.count[0], low = both + chunk.count[1], all = chunk.size();
  struct Product {
    const float *weights, *rows;
    float* sum;
  };
  for (const Product& p :
       {Product{m.weights, head.grad_output, m.grad_value}, Product{m.grad_scores, head.query, m.grad_key}}) {
    accumulate_word(p.weights, p.rows, d, chunk, 0, 0, low, p.sum);
    accumulate_word(p.weights, p.rows, d, chunk, 1, 0, both, p.sum);
    accumulate_word(p.weights, p.rows, d, chunk, 1, low, all, p.sum);
  }
}

void store_tile(const Rows& rows, int64_t n, int64_t h, int64_t tile, int64_t s, int64_t d, const float* from,
                float factor, float* scratch) {
  const int64_t count = s - tile * kTile < kTile ? s - tile * kTile : kTile;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t c = 0; c < padded(d); c += kFloatLanes) store(scratch + c, load(from + k * padded(d) + c) * factor);
    store_run(rows.data, rows.dtype, rows.offset(n, h, tile * kTile + k), d, scratch);
  }
}

void backward_tile(const MaskedAttentionArgs& args, const BackwardMemory& m, const BackwardHead& head, const Task& task,
                   int64_t h, int64_t tile, bool any) {
  const int64_t n = task.n, d = padded(args.channels);
  Prefetch next_key(args.key, task, h, tile + 1, args.keys, args.channels),
      next_value(args.value, task, h, tile + 1, args.keys, args.channels);
  for (float* gradient : {m.grad_key, m.grad_value})
    for (int64_t i = 0; i < kTile * d; i += kFloatLanes) store(gradient + i, FloatVec{});
  if (any) {
    load_tile(args.value, n, h, tile * kTile, args.keys, args.channels, m.key);
    transpose_tile(m.key, d, m.value_columns);
    load_tile(args.key, n, h, tile * kTile, args.keys, args.channels, m.key);
    transpose_tile(m.key, d, m.key_columns);
    const bool finite = all_finite(m.key, kTile * d);
    const BiasTile bias(args, tile);
    Chunk chunk;
    m.active.for_groups(args.queries, [&](int first, int words, const int32_t* index, int rows) {
      if (chunk.size() + rows > kChunk) {
        accumulate_chunk(args, m, head, chunk);
        chunk = Chunk{};
      }
      const int64_t at = chunk.size() * kTile;
      with_rows(rows, [&](auto r) {
        backward_group<decltype(r)::value>(args, m, head, bias, finite, first, words, index, m.weights + at,
                                           m.grad_scores + at);
      });
      for (int r = 0; r < rows; ++r) chunk.index[chunk.size() + r] = index[r];
      chunk.count[words == 2 ? 0 : first == 0 ? 1 : 2] += rows;
      next_key.lines(kLinesAtOnce);
      next_value.lines(kLinesAtOnce);
    });
    accumulate_chunk(args, m, head, chunk);
  }
  next_key.rest();
  next_value.rest();
  store_tile(args.grad_value, n, h, tile, args.keys, args.channels, m.grad_value, 1.0f, m.key);
  // The query rows carry scale * log2(e); their gradient's factor is scale.
  store_tile(args.grad_key, n, h, tile, args.keys, args.channels, m.grad_key, kLn2, m.key);
}

// Gradients of queries and bias from `parts` sums, `stride` floats apart.
void finish_queries(const MaskedAttentionArgs& args, int64_t n, int64_t h, const BackwardHead& head, int64_t parts,
                    int64_t stride) {
  const int64_t d = padded(args.channels);
  store_bias_gradients(args, n, h, head.grad_bias, parts, stride);
  for (int64_t q = 0; q < args.queries; ++q) {
    float* total = head.grad_query + q * d;
    for (int64_t c = 0; c < d; c += kFloatLanes) {
      FloatVec sum = load(total + c);
      for (int64_t part = 1; part < parts; ++part) sum += load(total + part * stride + c);
      store(total + c, sum * static_cast<float>(args.scale));
    }
    store_run(args.grad_query.data, args.grad_query.dtype, args.grad_query.offset(n, h, q), args.channels, total);
  }
}

void backward(const MaskedAttentionArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  const int64_t d = padded(args.channels);
  const size_t bytes = backward_head_bytes(args);
  Pieces pieces{static_cast<char*>(scratch)};
  BackwardMemory m(args, pieces);
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task task(args, index);
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
      const BackwardHead head = backward_head_of(args, task, h, pieces, bytes);
      float* output = head.query;  // until delta is known
      load_rows(args.saved_output, task.n, h, 0, args.queries, args.channels, 1.0f, output);
      load_rows(args.grad_output, task.n, h, 0, args.queries, args.channels, 1.0f, head.grad_output);
      for (int64_t q = 0; q < args.queries; ++q) {
        FloatVec sum = {};
        for (int64_t c = 0; c < d; c += kFloatLanes)
          sum += load(output + q * d + c) * load(head.grad_output + q * d + c);
        head.delta[q] = horizontal_sum(sum);
        head.logsumexp[q] = args.saved_logsumexp[(task.n * args.heads + h) * args.queries + q] * kLog2E;
      }
      load_rows(args.query, task.n, h, 0, args.queries, args.channels, static_cast<float>(args.scale) * kLog2E,
                head.query);
      for (int64_t i = 0; i < args.queries * d; i += kFloatLanes) store(head.grad_query + i, FloatVec{});
      load_bias(args, task.n, h, kLog2E, m.bias_row, head.bias);
      head.grad_bias.clear(args);
    }
    for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
      const bool any = m.active.find(args, task.n, tile);
      for (int64_t h = task.first_head; h < task.last_head; ++h) {
        backward_tile(args, m, backward_head_of(args, task, h, pieces, bytes), task, h, tile, any);
      }
    }
    if (args.parts > 1) continue;
    for (int64_t h = task.first_head; h < task.last_head; ++h)
      finish_queries(args, task.n, h, backward_head_of(args, task, h, pieces, bytes), 1, 0);
  }
}

void combine_backward(const MaskedAttentionArgs& args, int64_t first, int64_t last, void*) {
  const int64_t stride = backward_partial(args);
  for (int64_t index = first; index < last; ++index) {
    Pieces nothing{nullptr}, results{reinterpret_cast<char*>(args.partial + index * args.parts * stride)};
    const BackwardHead head(args, nothing, results);  // of the first part; the others follow `stride` floats apart
    finish_queries(args, index / args.heads, index % args.heads, head, args.parts, stride);
  }
}

}  // namespace
}  // namespace m2f
