// Shared by forward and backward of masked attention: packed tiles of keys, the queries with bits in a tile, and three
// small matrix products. Compiled once per instruction set.
#pragma once

#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/simd_bits.h"
#include "masked_attention/cpu_kernel.h"

namespace m2f {
namespace {

constexpr int kWord = 32;
constexpr int kWords = static_cast<int>(kTileKeys) / kWord;
constexpr int kTile = static_cast<int>(kTileKeys);
// Queries handled together: 6 rows x 4 vectors of keys accumulate in 24 of AVX-512's 32 registers, 6 x 2 elsewhere.
constexpr int kRows = 6;
constexpr int kKeyVectors = kVectorBytes == 64 ? 4 : 2;

// Channels padded to whole vectors.
inline int64_t padded(int64_t d) { return (d + kFloatLanes - 1) / kFloatLanes * kFloatLanes; }

// `count` rows as float, `padded(d)` apart, zero-padded, times `factor`.
inline void load_rows(const Rows& rows, int64_t i, int64_t j, int64_t first, int64_t count, int64_t d, float factor,
                      float* out) {
  for (int64_t r = 0; r < count; ++r) {
    float* row = out + r * padded(d);
    for (int64_t c = d / kFloatLanes * kFloatLanes; c < padded(d); c += kFloatLanes) store(row + c, FloatVec{});
    load_run(rows.data, rows.dtype, rows.offset(i, j, first + r), d, row);
    for (int64_t c = 0; c < padded(d); c += kFloatLanes) store(row + c, load(row + c) * factor);
  }
}

// `count` is that of a tile: a multiple of four vectors.
inline bool all_finite(const float* x, int64_t count) {
  FloatVec sum[4] = {};
  for (int64_t i = 0; i < count; i += 4 * kFloatLanes)
    for (int j = 0; j < 4; ++j) sum[j] += load(x + i + j * kFloatLanes) * 0.0f;  // NaN where x is not finite
  return horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) == 0;
}

// Transposes kFloatLanes x kFloatLanes numbers: log2 rounds of a perfect shuffle of the rows.
inline void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  FloatVec a[kFloatLanes], b[kFloatLanes];
  for (int i = 0; i < kFloatLanes; ++i) a[i] = load(in + i * in_stride);
#pragma GCC unroll 4
  for (int round = 1; round < kFloatLanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kFloatLanes / 2; ++i) {
      b[2 * i] = interleave<float, 0>(a[i], a[i + kFloatLanes / 2]);
      b[2 * i + 1] = interleave<float, 1>(a[i], a[i + kFloatLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kFloatLanes; ++i) a[i] = b[i];
  }
  for (int i = 0; i < kFloatLanes; ++i) store(out + i * out_stride, a[i]);
}

// rows [kTile][padded(d)] to columns [padded(d)][kTile].
inline void transpose_tile(const float* rows, int64_t d, float* columns) {
  for (int64_t c = 0; c < d; c += kFloatLanes)
    for (int64_t k = 0; k < kTile; k += kFloatLanes)
      transpose_block(rows + k * padded(d) + c, padded(d), columns + c * kTile + k, kTile);
}

// A tile's rows as float; those beyond S are zero.
inline void load_tile(const Rows& rows, int64_t i, int64_t j, int64_t first, int64_t s, int64_t d, float* out) {
  const int64_t count = s - first < kTile ? s - first : kTile;
  load_rows(rows, i, j, first, count, d, 1.0f, out);
  for (int64_t c = count * padded(d); c < kTile * padded(d); c += kFloatLanes) store(out + c, FloatVec{});
}

// The heads and the tiles of keys that a task owns. All heads of a group use a tile before the next one is read. If the
// heads are slices of rows of H*D elements, whole rows are then read in order, which is three times as fast as reading
// one head's strided slices.
struct Task {
  int64_t n, part, first_head, last_head, first_tile, last_tile;

  Task(const MaskedAttentionArgs& args, int64_t index) {
    const int64_t tiles = (args.keys + kTile - 1) / kTile, group = index / args.parts % args.head_groups;
    part = index % args.parts;
    n = index / args.parts / args.head_groups;
    first_head = group * args.heads / args.head_groups;
    last_head = (group + 1) * args.heads / args.head_groups;
    first_tile = part * tiles / args.parts;
    last_tile = (part + 1) * tiles / args.parts;
  }
};

inline int64_t most_heads(const MaskedAttentionArgs& args) {
  return (args.heads + args.head_groups - 1) / args.head_groups;
}

// Prefetches one head's part of the next tile, a cache line at a time, in the order of memory. A few lines between
// products cost nothing; all at once would wait for the line fill buffers.
struct Prefetch {
  const char* row = nullptr;
  int64_t rows = 0, row_bytes = 0, run_bytes = 0, byte = 0;

  Prefetch(const Rows& from, const Task& task, int64_t h, int64_t tile, int64_t s, int64_t d) {
    const int64_t first = tile * kTile, count = s - first < kTile ? s - first : kTile;
    if (count <= 0) return;
    const int64_t heads = task.last_head - task.first_head, share = h - task.first_head;
    const bool interleaved = from.stride[1] < from.stride[2];
    const int64_t begin = interleaved ? share * count / heads : 0;
    const int64_t end = interleaved ? (share + 1) * count / heads : count;
    const int64_t element = element_size(from.dtype);
    const int64_t offset = from.offset(task.n, interleaved ? task.first_head : h, first + begin);
    row = static_cast<const char*>(from.data) + offset * element;
    rows = end - begin;
    row_bytes = from.stride[2] * element;
    run_bytes = ((interleaved ? (heads - 1) * from.stride[1] : 0) + d) * element;
  }

  M2F_INLINE void lines(int64_t count) {
    for (; rows > 0 && count > 0; --count) {
      __builtin_prefetch(row + byte, 0, 2);
      byte += 64;
      if (byte < run_bytes) continue;
      byte = 0;
      row += row_bytes;
      --rows;
    }
  }

  M2F_INLINE void rest() { lines(INT64_MAX); }
};
constexpr int64_t kLinesAtOnce = 8;

// The queries with bits in a tile, in three lists: bits in both words, in the first only, in the second only.
struct ActiveQueries {
  int32_t* index;  // [3][Q]
  int64_t count[3];
  uint32_t* bits;  // [Q][kWords]

  static ActiveQueries take(Pieces& pieces, const MaskedAttentionArgs& args) {
    return {pieces.take<int32_t>(3 * args.queries), {}, pieces.take<uint32_t>(args.queries * kWords)};
  }

  // Returns true if there are any.
  bool find(const MaskedAttentionArgs& args, int64_t image, int64_t tile) {
    count[0] = count[1] = count[2] = 0;
    uint32_t valid[kWords];
    for (int w = 0; w < kWords; ++w) {
      const int64_t left = args.keys - tile * kTile - w * kWord;
      valid[w] = left >= kWord ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    }
    const int64_t available = args.words - tile * kWords;
    for (int64_t q = 0; q < args.queries; ++q) {
      const int64_t at = image * args.masked + q;
      const bool everywhere = q >= args.masked || !args.row_any[at];
      const int32_t* row = everywhere ? nullptr : args.bits + at * args.words + tile * kWords;
      const uint32_t low = (everywhere ? ~0u : static_cast<uint32_t>(row[0])) & valid[0];
      const uint32_t high = available < 2 ? 0 : (everywhere ? ~0u : static_cast<uint32_t>(row[1])) & valid[1];
      bits[q * kWords] = low;
      bits[q * kWords + 1] = high;
      if (!(low | high)) continue;
      const int list = !high ? 1 : !low ? 2 : 0;
      index[list * args.queries + count[list]++] = static_cast<int32_t>(q);
    }
    return count[0] + count[1] + count[2] > 0;
  }

  // Calls visit(first word, words, query indices, count) for groups of at most kRows queries.
  template <typename Visit>
  M2F_INLINE void for_groups(int64_t q, Visit visit) const {
    for (int list = 0; list < 3; ++list)
      for (int64_t i = 0; i < count[list]; i += kRows)
        visit(list == 2 ? 1 : 0, list == 0 ? 2 : 1, index + list * q + i,
              static_cast<int>(count[list] - i < kRows ? count[list] - i : kRows));
  }
};

// Calls f with the number of rows as a constant.
template <typename F>
M2F_INLINE void with_rows(int rows, F f) {
  static_assert(kRows == 6, "one case per number of rows");
  switch (rows) {
    case 6: return f(std::integral_constant<int, 6>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 1>{});
  }
}

// out[r][k] = sum over d of rows[index[r]][d] * columns[d][k], for kVectors vectors of keys.
template <int kR, int kVectors>
M2F_INLINE void multiply_columns(const float* rows, int64_t row_stride, const int32_t* index, const float* columns,
                                 int64_t d, float* out) {
  const float* row[kR];
  for (int r = 0; r < kR; ++r) row[r] = rows + index[r] * row_stride;
  FloatVec sum[kR][kVectors] = {};
  for (int64_t c = 0; c < d; ++c) {
    FloatVec b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = load(columns + c * kTile + v * kFloatLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
      const FloatVec a = splat<float>(row[r][c]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fused(a, b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * kTile + v * kFloatLanes, sum[r][v]);
}

// The same for `words` words of keys from word `first`.
template <int kR>
M2F_INLINE void scores(const float* rows, int64_t row_stride, const int32_t* index, const float* columns, int64_t d,
                       int first, int words, float* out) {
  for (int k = first * kWord; k < (first + words) * kWord;) {
    if (kKeyVectors == 4 && (first + words) * kWord - k >= 4 * kFloatLanes) {
      multiply_columns<kR, 4>(rows, row_stride, index, columns + k, d, out + k);
      k += 4 * kFloatLanes;
    } else {
      multiply_columns<kR, 2>(rows, row_stride, index, columns + k, d, out + k);
      k += 2 * kFloatLanes;
    }
  }
}

// sum[index[r]][:] = sum[index[r]][:] * factor[r] + sum over k of weights[r][k] * rows[k][:], k in [first, last).
template <int kR, int kVectors>
M2F_INLINE void accumulate_vectors(const float* weights, const float* rows, int64_t stride, int first, int last,
                                   const int32_t* index, const float* factor, float* sum) {
  FloatVec total[kR][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] = load(sum + index[r] * stride + v * kFloatLanes);
      if (factor) total[r][v] = total[r][v] * factor[r];
    }
  for (int k = first; k < last; ++k) {
    FloatVec b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = load(rows + k * stride + v * kFloatLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
      const FloatVec a = splat<float>(weights[r * kTile + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[r][v] = fused(a, b[v], total[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sum + index[r] * stride + v * kFloatLanes, total[r][v]);
}

template <int kR>
M2F_INLINE void accumulate_rows(const float* weights, const float* rows, int64_t stride, int first, int last,
                                const int32_t* index, const float* factor, float* sum) {
  int64_t c = 0;
  for (; c + 2 * kFloatLanes <= stride; c += 2 * kFloatLanes)
    accumulate_vectors<kR, 2>(weights, rows + c, stride, first, last, index, factor, sum + c);
  if (c < stride) accumulate_vectors<kR, 1>(weights, rows + c, stride, first, last, index, factor, sum + c);
}

// The same if some row is not finite. Only keys whose bit is set are added, since 0 * NaN is not 0. The arithmetic is
// the same, so that queries that do not attend to such a key get the same bits as without it.
inline void accumulate_attended(const float* weights, const uint32_t bits[kWords], const float* rows, int64_t stride,
                                float factor, float* sum) {
  for (int64_t c = 0; c < stride; c += kFloatLanes) {
    FloatVec total = load(sum + c) * factor;
    for (int k = 0; k < kTile; ++k)
      if (bits[k / kWord] >> (k % kWord) & 1)
        total = fused(splat<float>(weights[k]), load(rows + k * stride + c), total);
    store(sum + c, total);
  }
}

}  // namespace
}  // namespace m2f
