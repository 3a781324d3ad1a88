// Masked cross-attention on CPU, forward; compiled once per instruction set (backward: cpu_backward.h).
//
// A task is a range of an image's keys and a group of heads. It visits tiles of 64 keys. For each tile it lists the
// queries that have bits in it, once for all heads, and computes only these: the mask saves work in units of one query
// and 32 keys. The tile's keys are packed once, transposed, and serve all queries. Keys lie along the vectors of
// scores, so a word of bits is a vector mask. The softmax is online and in base 2. It rescales only if a tile's scores
// exceed the running maximum by more than kHeadroom. Scores stay in a few KB of L1 and are never written elsewhere.
//
// The number of parts that the keys are divided into depends on the shape alone, and parts are combined in order. So
// the result has the same bits for any number of threads.

#include "masked_attention/cpu_kernel.h"

#include "cpu/variant.h"
#include "masked_attention/cpu_backward.h"
#include "masked_attention/cpu_bias.h"
#include "masked_attention/cpu_tiles.h"

namespace m2f {
namespace {

// In powers of two. Weights stay below 2^kHeadroom times the largest true weight: far from overflow, and no less exact.
constexpr float kHeadroom = 8;

// One head's queries and the sums over the keys so far: unnormalised output [Q][padded(D)], running maximum [Q] and sum
// of weights [Q][lanes], which is added up over lanes at the end [Q].
struct Head {
  float *query, *normaliser;
  HeadBias bias;
  float *sum, *maximum, *total;

  // If the keys are divided into parts, the last three are the results of the head.
  Head(const MaskedAttentionArgs& args, Pieces& pieces, Pieces& results) : bias(args, pieces) {
    query = pieces.take<float>(args.queries * padded(args.channels));
    normaliser = pieces.take<float>(args.queries * kFloatLanes);
    sum = results.take<float>(args.queries * padded(args.channels));
    maximum = results.take<float>(args.queries);
    total = results.take<float>(args.queries);
  }
};

int64_t forward_partial(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr}, results{nullptr};
  Head head(args, pieces, results);
  return static_cast<int64_t>(results.used / sizeof(float));
}

struct ForwardMemory {
  ActiveQueries active;
  float *tile, *key_columns, *value, *weights, *bias_row;

  ForwardMemory(const MaskedAttentionArgs& args, Pieces& pieces) {
    active = ActiveQueries::take(pieces, args);
    for (float** rows : {&tile, &key_columns, &value}) *rows = pieces.take<float>(kTile * padded(args.channels));
    weights = pieces.take<float>(kRows * kTile);
    bias_row = pieces.take<float>(bias_row_scratch(args));
  }
};

// One head of a task; each takes the same amount of scratch.
Head head_of(const MaskedAttentionArgs& args, const Task& task, int64_t h, Pieces pieces, size_t head_bytes) {
  pieces.used += (h - task.first_head) * head_bytes;
  if (args.parts == 1) return Head(args, pieces, pieces);
  const int64_t index = (task.n * args.heads + h) * args.parts + task.part;
  Pieces results{reinterpret_cast<char*>(args.partial + index * forward_partial(args))};
  return Head(args, pieces, results);
}

size_t head_bytes(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr};
  Head head(args, pieces, pieces);
  return pieces.used;
}

size_t forward_scratch(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr};
  ForwardMemory memory(args, pieces);
  return pieces.used + most_heads(args) * head_bytes(args);
}

// Turns the scores of one query in [first, first + words) into weights. Returns the factor for the sums so far.
M2F_INLINE float online_softmax(float* row, const uint32_t* bits, int first, int words, float& maximum_,
                                FloatVec& sum) {
  const FloatVec minus_infinity = splat<float>(-__builtin_inff());
  const int begin = first * kWord, end = (first + words) * kWord;
  FloatVec largest = minus_infinity;
  for (int k = begin; k < end; k += kFloatLanes) {
    const FloatVec x = select_bits(bits[k / kWord] >> (k % kWord), load(row + k), minus_infinity);
    store(row + k, x);
    largest = maximum(x, largest);
  }
  float factor = 1;
  if (__builtin_expect(greater_bits(largest, splat<float>(maximum_ + kHeadroom)) != 0, 0)) {
    const float now = horizontal_max(largest);
    factor = exp2(splat<float>(maximum_ - now))[0];
    sum = sum * factor;
    maximum_ = now;
  }
  // If all scores so far are -inf, nothing is subtracted: -inf - -inf would be NaN.
  const FloatVec shift = splat<float>(maximum_ == -__builtin_inff() ? 0.0f : maximum_);
  for (int k = begin; k < end; k += kFloatLanes) {
    const FloatVec p = exp2(load(row + k) - shift);
    store(row + k, p);
    sum += p;
  }
  return factor;
}

template <int kR>
void forward_group(const MaskedAttentionArgs& args, const ForwardMemory& m, const Head& head, const BiasTile& bias,
                   bool finite, int first, int words, const int32_t* index) {
  const int64_t d = padded(args.channels);
  scores<kR>(head.query, d, index, m.key_columns, args.channels, first, words, m.weights);
  if (biased(args)) add_bias<kR>(args, head.bias, bias, first, words, index, m.weights);
  float factor[kR];
  bool rescale = false;
  for (int r = 0; r < kR; ++r) {
    const int64_t q = index[r];
    FloatVec sum = load(head.normaliser + q * kFloatLanes);
    factor[r] = online_softmax(m.weights + r * kTile, m.active.bits + q * kWords, first, words, head.maximum[q], sum);
    rescale |= factor[r] != 1;
    store(head.normaliser + q * kFloatLanes, sum);
  }
  if (__builtin_expect(finite, 1)) {
    accumulate_rows<kR>(m.weights, m.value, d, first * kWord, (first + words) * kWord, index,
                        rescale ? factor : nullptr, head.sum);
    return;
  }
  for (int r = 0; r < kR; ++r)
    accumulate_attended(m.weights + r * kTile, m.active.bits + index[r] * kWords, m.value, d, factor[r],
                        head.sum + index[r] * d);
}

void forward_tile(const MaskedAttentionArgs& args, const ForwardMemory& m, const Head& head, const Task& task,
                  int64_t h, int64_t tile) {
  const int64_t n = task.n, d = padded(args.channels);
  Prefetch next_key(args.key, task, h, tile + 1, args.keys, args.channels),
      next_value(args.value, task, h, tile + 1, args.keys, args.channels);
  load_tile(args.key, n, h, tile * kTile, args.keys, args.channels, m.tile);
  transpose_tile(m.tile, d, m.key_columns);
  load_tile(args.value, n, h, tile * kTile, args.keys, args.channels, m.value);
  const bool finite = all_finite(m.value, kTile * d);
  const BiasTile bias(args, tile);
  m.active.for_groups(args.queries, [&](int first, int words, const int32_t* index, int rows) {
    with_rows(rows,
              [&](auto r) { forward_group<decltype(r)::value>(args, m, head, bias, finite, first, words, index); });
    next_key.lines(kLinesAtOnce);
    next_value.lines(kLinesAtOnce);
  });
  next_key.rest();
  next_value.rest();
}

// Output and log-sum-exp of one query from its unnormalised sum, maximum and sum of weights.
void finish(const MaskedAttentionArgs& args, int64_t n, int64_t h, int64_t q, float* sum, float maximum_, float total) {
  for (int64_t c = 0; c < args.channels; c += kFloatLanes) store(sum + c, load(sum + c) / total);
  store_run(args.output.data, args.output.dtype, args.output.offset(n, h, q), args.channels, sum);
  args.logsumexp[(n * args.heads + h) * args.queries + q] = (maximum_ + __builtin_log2f(total)) * 0.6931471805599453f;
}

void forward(const MaskedAttentionArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  const int64_t d = padded(args.channels);
  const float log2_scale = static_cast<float>(args.scale * 1.4426950408889634);
  const size_t bytes = head_bytes(args);
  Pieces pieces{static_cast<char*>(scratch)};
  ForwardMemory m(args, pieces);
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task task(args, index);
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
      const Head head = head_of(args, task, h, pieces, bytes);
      load_rows(args.query, task.n, h, 0, args.queries, args.channels, log2_scale, head.query);
      load_bias(args, task.n, h, kLog2E, m.bias_row, head.bias);
      for (int64_t i = 0; i < args.queries * d; i += kFloatLanes) store(head.sum + i, FloatVec{});
      for (int64_t q = 0; q < args.queries; ++q) {
        head.maximum[q] = -__builtin_inff();
        store(head.normaliser + q * kFloatLanes, FloatVec{});
      }
    }
    for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
      if (!m.active.find(args, task.n, tile)) continue;
      for (int64_t h = task.first_head; h < task.last_head; ++h) {
        forward_tile(args, m, head_of(args, task, h, pieces, bytes), task, h, tile);
      }
    }
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
      const Head head = head_of(args, task, h, pieces, bytes);
      for (int64_t q = 0; q < args.queries; ++q) {
        head.total[q] = horizontal_sum(load(head.normaliser + q * kFloatLanes));
        if (args.parts == 1) finish(args, task.n, h, q, head.sum + q * d, head.maximum[q], head.total[q]);
      }
    }
  }
}

void combine_forward(const MaskedAttentionArgs& args, int64_t first, int64_t last, void* scratch) {
  const int64_t d = padded(args.channels), stride = forward_partial(args);
  float* sum = static_cast<float*>(scratch);
  for (int64_t index = first; index < last; ++index) {
    Pieces nothing{nullptr}, results{reinterpret_cast<char*>(args.partial + index * args.parts * stride)};
    const Head head(args, nothing, results);  // of the first part; the others follow `stride` floats apart
    for (int64_t q = 0; q < args.queries; ++q) {
      float largest = -__builtin_inff(), total = 0;
      for (int64_t part = 0; part < args.parts; ++part) {
        const float maximum_ = head.maximum[part * stride + q];
        if (maximum_ > largest) largest = maximum_;
      }
      const float shift = largest == -__builtin_inff() ? 0.0f : largest;
      for (int64_t c = 0; c < d; c += kFloatLanes) store(sum + c, FloatVec{});
      for (int64_t part = 0; part < args.parts; ++part) {
        const float factor = exp2(splat<float>(head.maximum[part * stride + q] - shift))[0];
        total += head.total[part * stride + q] * factor;
        for (int64_t c = 0; c < d; c += kFloatLanes)
          store(sum + c, load(sum + c) + load(head.sum + part * stride + q * d + c) * factor);
      }
      finish(args, index / args.heads, index % args.heads, q, sum, largest, total);
    }
  }
}

}  // namespace

const MaskedAttentionKernels& M2F_FOR_VARIANT(masked_attention_kernels)() {
  static const MaskedAttentionKernels kernels = {forward_scratch, forward,         backward_scratch, backward,
                                                 forward_partial, combine_forward, backward_partial, combine_backward};
  return kernels;
}

}  // namespace m2f
