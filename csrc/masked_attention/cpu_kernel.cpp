// Masked cross-attention on CPU, forward; compiled once per instruction set (backward: cpu_backward.cpp).
//
// A task is one head of one image and a range of its keys, walked in tiles of 64. For each tile the queries that have
// bits in it are listed, and only they are touched: the mask saves work at the grain of one query and 32 keys. A tile's
// keys are packed once, transposed, and serve all its queries: scores are products with keys along the vector, so a
// word of bits is a vector mask; the softmax is online, in base 2, and rescales only where a tile's scores exceed the
// running maximum by more than kHeadroom. Scores live in a few KB of L1 and nowhere else.
//
// How many parts the keys are divided into depends on the shape alone, and parts are combined in order: the same bits
// come out for any number of threads.

#include "masked_attention/cpu_kernel.h"

#include "masked_attention/cpu_backward.h"
#include "masked_attention/cpu_tiles.h"

#if !defined(M2F_VARIANT)
#error "compile this file through CMake, which defines M2F_VARIANT"
#endif

namespace m2f {
namespace {

// In powers of two: weights stay below 2^kHeadroom times the largest true one, far from overflow and exact all the same.
constexpr float kHeadroom = 8;

struct ForwardMemory {
  ActiveQueries active;
  float *query, *tile, *key_columns, *value, *weights;
  // What a task leaves behind: unnormalised output [Q][padded(D)], running maximum [Q], sum of weights [Q][lanes].
  float *sum, *maximum, *normaliser;

  ForwardMemory(const MaskedAttentionArgs& args, Pieces& pieces, float* partial) {
    const int64_t d = padded(args.d);
    active = ActiveQueries::take(pieces, args);
    query = pieces.take<float>(args.q * d);
    tile = pieces.take<float>(kTile * d);
    key_columns = pieces.take<float>(kTile * d);
    value = pieces.take<float>(kTile * d);
    weights = pieces.take<float>(kRows * kTile);
    Pieces own{reinterpret_cast<char*>(partial)};
    Pieces& results = partial ? own : pieces;
    sum = results.take<float>(args.q * d);
    maximum = results.take<float>(args.q);
    normaliser = results.take<float>(args.q * kFloatLanes);
  }
};

int64_t forward_partial(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr};
  pieces.take<float>(args.q * padded(args.d));
  pieces.take<float>(args.q);
  pieces.take<float>(args.q * kFloatLanes);
  return static_cast<int64_t>(pieces.used / sizeof(float));
}

size_t forward_scratch(const MaskedAttentionArgs& args) {
  Pieces pieces{nullptr};
  ForwardMemory memory(args, pieces, nullptr);
  return pieces.used;
}

// Scores of one query in [first, first + words) become weights; returns the factor for what was summed before.
M2F_INLINE float online_softmax(float* row, const uint32_t* bits, int first, int words, float& maximum_, FloatVec& sum) {
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
    const float now = max_lanes(largest);
    factor = exp2(splat<float>(maximum_ - now))[0];
    sum = sum * factor;
    maximum_ = now;
  }
  // While nothing but -inf was seen there is nothing to subtract: -inf - -inf would be NaN.
  const FloatVec shift = splat<float>(maximum_ == -__builtin_inff() ? 0.0f : maximum_);
  for (int k = begin; k < end; k += kFloatLanes) {
    const FloatVec p = exp2(load(row + k) - shift);
    store(row + k, p);
    sum += p;
  }
  return factor;
}

template <int kR>
void forward_group(const MaskedAttentionArgs& args, ForwardMemory& m, bool finite, int first, int words,
                   const int32_t* index) {
  const int64_t d = padded(args.d);
  scores<kR>(m.query, d, index, m.key_columns, args.d, first, words, m.weights);
  float factor[kR];
  bool rescale = false;
  for (int r = 0; r < kR; ++r) {
    const int64_t q = index[r];
    FloatVec sum = load(m.normaliser + q * kFloatLanes);
    factor[r] = online_softmax(m.weights + r * kTile, m.active.bits + q * kWords, first, words, m.maximum[q], sum);
    rescale |= factor[r] != 1;
    store(m.normaliser + q * kFloatLanes, sum);
  }
  if (__builtin_expect(finite, 1)) {
    accumulate_rows<kR>(m.weights, m.value, d, first * kWord, (first + words) * kWord, index, rescale ? factor : nullptr,
                        m.sum);
    return;
  }
  for (int r = 0; r < kR; ++r)
    accumulate_attended(m.weights + r * kTile, m.active.bits + index[r] * kWords, m.value, d, factor[r],
                        m.sum + index[r] * d);
}

// Output and log-sum-exp of one query from its unnormalised sum, maximum and normaliser.
void finish(const MaskedAttentionArgs& args, int64_t n, int64_t h, int64_t q, float* sum, float maximum_,
            FloatVec normaliser) {
  const float total = sum_lanes(normaliser);
  for (int64_t c = 0; c < args.d; c += kFloatLanes) store(sum + c, load(sum + c) / total);
  store_run(args.output.data, args.output.dtype, args.output.offset(n, h, q), args.d, sum);
  args.logsumexp[(n * args.h + h) * args.q + q] = (maximum_ + __builtin_log2f(total)) * 0.6931471805599453f;
}

void forward(const MaskedAttentionArgs& args, int64_t first_task, int64_t last_task, void* scratch) {
  const int64_t d = padded(args.d), tiles = (args.s + kTile - 1) / kTile;
  const float log2_scale = static_cast<float>(args.scale * 1.4426950408889634);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t part = task % args.parts, head = task / args.parts, n = head / args.h, h = head % args.h;
    Pieces pieces{static_cast<char*>(scratch)};
    ForwardMemory m(args, pieces, args.parts > 1 ? args.partial + task * forward_partial(args) : nullptr);
    load_rows(args.query, n, h, 0, args.q, args.d, log2_scale, m.query);
    for (int64_t i = 0; i < args.q * d; i += kFloatLanes) store(m.sum + i, FloatVec{});
    for (int64_t q = 0; q < args.q; ++q) {
      m.maximum[q] = -__builtin_inff();
      store(m.normaliser + q * kFloatLanes, FloatVec{});
    }
    for (int64_t tile = part * tiles / args.parts; tile < (part + 1) * tiles / args.parts; ++tile) {
      if (!m.active.find(args, n, tile)) continue;
      load_tile(args.key, n, h, tile * kTile, args.s, args.d, m.tile);
      transpose_tile(m.tile, d, m.key_columns);
      load_tile(args.value, n, h, tile * kTile, args.s, args.d, m.value);
      const bool finite = all_finite(m.value, kTile * d);
      m.active.for_groups(args.q, [&](int first, int words, const int32_t* index, int rows) {
        with_rows(rows, [&](auto r) { forward_group<decltype(r)::value>(args, m, finite, first, words, index); });
      });
    }
    if (args.parts > 1) continue;
    for (int64_t q = 0; q < args.q; ++q)
      finish(args, n, h, q, m.sum + q * d, m.maximum[q], load(m.normaliser + q * kFloatLanes));
  }
}

void combine_forward(const MaskedAttentionArgs& args, int64_t first, int64_t last, void* scratch) {
  const int64_t d = padded(args.d);
  float* total = static_cast<float*>(scratch);
  for (int64_t head = first; head < last; ++head) {
    for (int64_t q = 0; q < args.q; ++q) {
      float largest = -__builtin_inff();
      FloatVec normaliser = {};
      for (int64_t c = 0; c < d; c += kFloatLanes) store(total + c, FloatVec{});
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t part = 0; part < args.parts; ++part) {
          float* partial = args.partial + (head * args.parts + part) * forward_partial(args);
          Pieces nothing{nullptr};
          const ForwardMemory m(args, nothing, partial);
          if (pass == 0) {
            if (m.maximum[q] > largest) largest = m.maximum[q];
            continue;
          }
          const float shift = largest == -__builtin_inff() ? 0.0f : largest;
          const float factor = exp2(splat<float>(m.maximum[q] - shift))[0];
          normaliser += load(m.normaliser + q * kFloatLanes) * factor;
          for (int64_t c = 0; c < d; c += kFloatLanes)
            store(total + c, load(total + c) + load(m.sum + q * d + c) * factor);
        }
      }
      finish(args, head / args.h, head % args.h, q, total, largest, normaliser);
    }
  }
}

}  // namespace

#define M2F_CONCATENATE_(a, b) a##b
#define M2F_CONCATENATE(a, b) M2F_CONCATENATE_(a, b)

const MaskedAttentionKernels& M2F_CONCATENATE(masked_attention_kernels_, M2F_VARIANT)() {
  static const MaskedAttentionKernels kernels = {forward_scratch,  forward,         backward_scratch, backward,
                                                 forward_partial, combine_forward, backward_partial, combine_backward};
  return kernels;
}

}  // namespace m2f
