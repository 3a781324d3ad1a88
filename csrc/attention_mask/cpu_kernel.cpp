// Attention masks on CPU; compiled once per instruction set.
//
// Prediction is a matrix product that stores one bit per element. A task owns a group of keys. It packs their features
// into panels of 32 keys, the width of one word of bits; a panel of 256 channels fills two thirds of a 48 KiB L1 cache.
// Every block of queries then passes over a panel and keeps all its accumulators in registers. The epilogue compares
// each vector with zero. In memory the channels of a key lie thousands of elements apart, so packing reads each cache
// line once.

#include "attention_mask/cpu_kernel.h"

#include "cpu/simd.h"
#include "cpu/simd_bits.h"
#include "cpu/variant.h"

namespace m2f {
namespace {

constexpr int kWord = 32;

// ---------------------------------------------------------------- resize
// sum[x] = a[x] + b[x], or the mean of both with a weight for b.
template <typename V>
void blend_rows(const V* a, const V* b, int64_t width, const float* weight, float* sum) {
  for (int64_t x = 0; x < width; x += kFloatLanes) {
    const int count = width - x < kFloatLanes ? static_cast<int>(width - x) : kFloatLanes;
    const FloatVec va = count == kFloatLanes ? load(a + x) : load_first(a + x, count);
    const FloatVec vb = count == kFloatLanes ? load(b + x) : load_first(b + x, count);
    store(sum + x, weight ? va * (1 - *weight) + vb * *weight : va + vb);
  }
}

template <int kRatio>
void centre_pairs(const float* sum, int64_t width, float* out) {
  int64_t x = 0;
  if constexpr (kRatio == 2) {
    for (; x + kFloatLanes <= width; x += kFloatLanes) {
      const FloatVec a = load(sum + 2 * x), b = load(sum + 2 * x + kFloatLanes);
      store(out + x, 0.25f * (every_second<float, 0>(a, b) + every_second<float, 1>(a, b)));
    }
  }
  for (; x < width; ++x) out[x] = 0.25f * (sum[kRatio * x + kRatio / 2 - 1] + sum[kRatio * x + kRatio / 2]);
}

template <typename V>
void resize_planes(const ResizeArgs& args, int64_t first, int64_t last, float* scratch) {
  float *sum = scratch, *out = scratch + args.width + kFloatLanes;
  for (int64_t plane = first; plane < last; ++plane) {
    const int64_t n = plane / args.channels, c = plane % args.channels, target = args.output.offset(n, c, 0);
    const auto row = [&](int64_t y) { return static_cast<const V*>(args.input.data) + args.input.offset(n, c, y); };
    for (int l = 0; l < args.levels; ++l) {
      const ResizeLevel& level = args.level[l];
      const int64_t r = level.ratio;
      for (int64_t y = 0; y < level.height; ++y) {
        if (r) {
          blend_rows(row(y * r + r / 2 - 1), row(y * r + r / 2), args.width, nullptr, sum);
          if (r == 2) centre_pairs<2>(sum, level.width, out);
          if (r == 4) centre_pairs<4>(sum, level.width, out);
          if (r == 8) centre_pairs<8>(sum, level.width, out);
        } else {
          blend_rows(row(level.rows[2 * y]), row(level.rows[2 * y + 1]), args.width, level.row_weight + y, sum);
          for (int64_t x = 0; x < level.width; ++x) {
            const float w = level.column_weight[x];
            out[x] = sum[level.columns[2 * x]] * (1 - w) + sum[level.columns[2 * x + 1]] * w;
          }
        }
        store_run(args.output.data, args.output.dtype, target + level.start + y * level.width, level.width, out);
      }
    }
  }
}

void resize(const ResizeArgs& args, int64_t first, int64_t last, float* scratch) {
  with_type<false>(args.input.dtype, [&](auto v) { resize_planes<decltype(v)>(args, first, last, scratch); });
}

// ---------------------------------------------------------------- prediction
// A block has as many queries as registers allow, each with two vectors of keys: 24 of 32 registers accumulate with
// AVX-512, otherwise 12 of 16.
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
constexpr int kColumns = 2 * kFloatLanes;

int64_t query_blocks(const PredictArgs& args) { return (args.queries + kRows - 1) / kRows; }

size_t packed_embed(const PredictArgs& args) { return query_blocks(args) * args.channels * kRows * sizeof(float); }

// Layout [block][channel][query of the block]: the values that one channel broadcasts are adjacent.
void pack_embed(const PredictArgs& args, int64_t image, float* packed) {
  for (int64_t q = 0; q < query_blocks(args) * kRows; ++q) {
    float* column = packed + q / kRows * args.channels * kRows + q % kRows;
    for (int64_t c = 0; c < args.channels; c += kFloatLanes) {
      const int64_t count = args.channels - c < kFloatLanes ? args.channels - c : kFloatLanes;
      alignas(64) float run[kFloatLanes] = {};
      if (q < args.queries) load_run(args.embed.data, args.embed.dtype, args.embed.offset(image, q, 0) + c, count, run);
      for (int64_t i = 0; i < count; ++i) column[(c + i) * kRows] = run[i];
    }
  }
}

size_t predict_scratch(const PredictArgs& args) { return args.channels * kKeysPerTask * sizeof(float); }

// Packs `keys` keys from `start` on into panels [word][channel][32 keys], and fills the last panel with zeros.
template <typename V>
void pack_features(const PredictArgs& args, int64_t image, int64_t start, int64_t keys, float* panels) {
  const V* data = static_cast<const V*>(args.features.data);
  for (int64_t c = 0; c < args.channels; ++c) {
    const V* row = data + args.features.offset(image, c, 0) + start;
    for (int64_t key = 0; key < kKeysPerTask; key += kFloatLanes) {
      FloatVec x = {};
      if (key + kFloatLanes <= keys) {
        x = load(row + key);
      } else if (key < keys) {
        x = load_first(row + key, static_cast<int>(keys - key));
      }
      store(panels + (key / kWord * args.channels + c) * kWord + key % kWord, x);
    }
  }
}

// Prefetches the features of the next group, one cache line per call. Their rows lie thousands of keys apart, and
// hardware prefetchers do not follow such strides. Products call it at every fourth channel, which spreads the lines.
struct Prefetch {
  const char* row;
  int64_t rows, row_bytes, run_bytes, byte;

  M2F_INLINE void line() {
    if (rows == 0) return;
    __builtin_prefetch(row + byte, 0, 2);
    byte += 64;
    if (byte < run_bytes) return;
    byte = 0;
    row += row_bytes;
    --rows;
  }
};

template <typename V>
Prefetch prefetch_group(const PredictArgs& args, int64_t task, int64_t last, int64_t groups) {
  if (task >= last) return {};
  const int64_t start = task % groups * kKeysPerTask;
  const int64_t keys = args.keys - start < kKeysPerTask ? args.keys - start : kKeysPerTask;
  const V* first = static_cast<const V*>(args.features.data) + args.features.offset(task / groups, 0, 0) + start;
  return {reinterpret_cast<const char*>(first), args.channels, args.features.stride[1] * int64_t{sizeof(V)},
          keys * int64_t{sizeof(V)}, 0};
}

// Bits of kRows queries for kColumns keys.
M2F_INLINE void predict_block(const float* embed, const float* panel, int64_t channels, Prefetch& next,
                              uint32_t bits[kRows]) {
  FloatVec sum[kRows][2] = {};
  for (int64_t c = 0; c < channels; ++c) {
    if (c % 4 == 0) next.line();
    const FloatVec b0 = load(panel + c * kWord), b1 = load(panel + c * kWord + kFloatLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const FloatVec a = splat<float>(embed[c * kRows + r]);
      sum[r][0] = fused(a, b0, sum[r][0]);
      sum[r][1] = fused(a, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    bits[r] = not_less_bits(sum[r][0], FloatVec{}) | not_less_bits(sum[r][1], FloatVec{}) << kFloatLanes;
}

template <typename V>
void predict_tasks(const PredictArgs& args, int64_t first, int64_t last, float* panels) {
  const int64_t groups = (args.keys + kKeysPerTask - 1) / kKeysPerTask, words = (args.keys + kWord - 1) / kWord;
  for (int64_t task = first; task < last; ++task) {
    const int64_t image = task / groups, start = task % groups * kKeysPerTask;
    const int64_t keys = args.keys - start < kKeysPerTask ? args.keys - start : kKeysPerTask;
    pack_features<V>(args, image, start, keys, panels);
    Prefetch next = prefetch_group<V>(args, task + 1, last, groups);
    const float* embed = args.packed_embed + image * (packed_embed(args) / sizeof(float));
    for (int64_t word = 0; word * kWord < keys; ++word) {
      const int64_t inside = keys - word * kWord;
      const uint32_t valid = inside >= kWord ? ~0u : (1u << inside) - 1;
      const float* panel = panels + word * args.channels * kWord;
      for (int64_t block = 0; block < query_blocks(args); ++block) {
        uint32_t found[kRows] = {};
        for (int column = 0; column < kWord; column += kColumns) {
          uint32_t bits[kRows];
          predict_block(embed + block * args.channels * kRows, panel + column, args.channels, next, bits);
          for (int r = 0; r < kRows; ++r) found[r] |= bits[r] << column;
        }
        for (int r = 0; r < kRows && block * kRows + r < args.queries; ++r) {
          const int64_t row = image * args.queries + block * kRows + r;
          args.bits[row * words + start / kWord + word] = static_cast<int32_t>(found[r] & valid);
          // Several tasks may write this element, always the same value.
          if (found[r] & valid) __atomic_store_n(args.row_any + row, true, __ATOMIC_RELAXED);
        }
      }
    }
  }
}

void predict(const PredictArgs& args, int64_t first, int64_t last, void* scratch) {
  float* panels = static_cast<float*>(scratch);
  with_type<false>(args.features.dtype, [&](auto v) { predict_tasks<decltype(v)>(args, first, last, panels); });
}

// ---------------------------------------------------------------- packing of a mask that exists
uint32_t pack_bools(const uint8_t* mask, int64_t count) {
  constexpr uint64_t kLow = 0x0101010101010101u;
  uint8_t padded[kWord] = {};
  if (count < kWord) {
    std::memcpy(padded, mask, count);
    mask = padded;
  }
  uint32_t word = 0;
  for (int i = 0; i < kWord; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, mask + i, 8);
    bytes = (((bytes & 0x7f * kLow) + 0x7f * kLow) | bytes) >> 7 & kLow;  // any non-zero byte counts as true
    word |= static_cast<uint32_t>(bytes * 0x0102040810204080u >> 56) << i;
  }
  return word;
}

template <typename V>
uint32_t pack_logits(const V* mask, int64_t count) {
  uint32_t word = 0;
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    const bool whole = i + kFloatLanes <= count;
    const FloatVec x = whole ? load(mask + i) : load_first(mask + i, static_cast<int>(count - i));
    word |= not_less_bits(x, FloatVec{}) << i;
  }
  return count < kWord ? word & ((1u << count) - 1) : word;
}

template <typename PackWord>
void pack_rows(const PackArgs& args, int64_t first, int64_t last, PackWord pack_word) {
  const int64_t words = (args.keys + kWord - 1) / kWord;
  for (int64_t row = first; row < last; ++row) {
    uint32_t any = 0;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t left = args.keys - w * kWord;
      const uint32_t word = pack_word(row * args.stride + w * kWord, left < kWord ? left : kWord);
      args.bits[row * words + w] = static_cast<int32_t>(word);
      any |= word;
    }
    args.row_any[row] = any != 0;
  }
}

void pack(const PackArgs& args, int64_t first, int64_t last) {
  if (!args.logits)
    return pack_rows(args, first, last, [&](int64_t offset, int64_t count) {
      return pack_bools(static_cast<const uint8_t*>(args.mask) + offset, count);
    });
  with_type<false>(args.dtype, [&](auto v) {
    pack_rows(args, first, last, [&](int64_t offset, int64_t count) {
      return pack_logits(static_cast<const decltype(v)*>(args.mask) + offset, count);
    });
  });
}

}  // namespace

const AttentionMaskKernels& M2F_FOR_VARIANT(attention_mask_kernels)() {
  static const AttentionMaskKernels kernels = {resize, packed_embed, pack_embed, predict_scratch, predict, pack};
  return kernels;
}

}  // namespace m2f
