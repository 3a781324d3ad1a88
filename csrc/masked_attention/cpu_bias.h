// A bias of rows and columns of keys on CPU: what it adds to scores, and its gradients. Compiled once per instruction
// set.
//
// Key k lies in row k / width and column k % width. A tile is 64 keys from anywhere in a row, so a query's columns are
// stretched: continued from the start until any tile's are one run. Along a vector of keys a row is one number, or a
// few chosen by lane.
#pragma once

#include "masked_attention/cpu_tiles.h"

namespace m2f {
namespace {

inline bool biased(const MaskedAttentionArgs& args) { return args.width > 0; }
inline int64_t stretched(const MaskedAttentionArgs& args) { return biased(args) ? args.width + kTile : 0; }

// The numbers of one head: by_row [Q][height], by_column [Q][stretched].
struct HeadBias {
  float *by_row, *by_column;

  HeadBias(const MaskedAttentionArgs& args, Pieces& pieces) {
    by_row = pieces.take<float>(args.queries * args.height);
    by_column = pieces.take<float>(args.queries * stretched(args));
  }

  void clear(const MaskedAttentionArgs& args) const {
    __builtin_memset(by_row, 0, args.queries * args.height * sizeof(float));
    __builtin_memset(by_column, 0, args.queries * stretched(args) * sizeof(float));
  }
};

// Where the rows of a tile's keys begin.
struct BiasTile {
  static constexpr int kVectors = kTile / kFloatLanes;
  int64_t column;          // of the first key
  int64_t row[kVectors];   // of each vector's first key
  int64_t next[kVectors];  // lanes from there to the row after it

  BiasTile(const MaskedAttentionArgs& args, int64_t tile) {
    if (!biased(args)) return;
    column = tile * kTile % args.width;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t key = tile * kTile + v * kFloatLanes;
      // Keys beyond the last are blocked; they only must not be read outside.
      row[v] = key / args.width < args.height ? key / args.width : args.height - 1;
      next[v] = (row[v] + 1) * args.width - key;
    }
  }
};

template <typename V>
inline void load_strided(const V* p, int64_t stride, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = load_first(p + i * stride, 1)[0];
}

// `count` numbers of one query as float, times `factor`.
inline void load_bias(const BiasRows& from, int64_t n, int64_t h, int64_t q, int64_t count, float factor, float* out) {
  const int64_t at = from.rows.offset(n, h, q);
  const void* data = from.rows.data;
  if (from.stride == 1) {
    load_run(data, from.rows.dtype, at, count, out);
  } else if (from.rows.dtype == DType::kFloat32) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const float*>(data)[at + i * from.stride];
  } else if (from.rows.dtype == DType::kBFloat16) {
    load_strided(static_cast<const BFloat16*>(data) + at, from.stride, count, out);
  } else {
    load_strided(static_cast<const Float16*>(data) + at, from.stride, count, out);
  }
  for (int64_t i = 0; i < count; ++i) out[i] *= factor;
}

inline void load_bias(const MaskedAttentionArgs& args, int64_t n, int64_t h, float factor, float* row_scratch,
                      const HeadBias& bias) {
  if (!biased(args)) return;
  for (int64_t q = 0; q < args.queries; ++q) {
    // Loads touch up to the next full vector.
    load_bias(args.by_row, n, h, q, args.height, factor, row_scratch);
    __builtin_memcpy(bias.by_row + q * args.height, row_scratch, args.height * sizeof(float));
    load_bias(args.by_column, n, h, q, args.width, factor, row_scratch);
    float* columns = bias.by_column + q * stretched(args);
    for (int64_t at = 0; at < stretched(args); at += args.width) {
      const int64_t left = stretched(args) - at;
      __builtin_memcpy(columns + at, row_scratch, (left < args.width ? left : args.width) * sizeof(float));
    }
  }
}

inline int64_t bias_row_scratch(const MaskedAttentionArgs& args) {
  return biased(args) ? (args.height > args.width ? args.height : args.width) + kFloatLanes : 0;
}

// scores[r][:] += the bias of query index[r], in `words` words of keys from word `first`.
template <int kR>
M2F_INLINE void add_bias(const MaskedAttentionArgs& args, const HeadBias& bias, const BiasTile& tile, int first,
                         int words, const int32_t* index, float* scores) {
  for (int r = 0; r < kR; ++r) {
    const float* rows = bias.by_row + index[r] * args.height;
    const float* columns = bias.by_column + index[r] * stretched(args) + tile.column;
    for (int k = first * kWord; k < (first + words) * kWord; k += kFloatLanes) {
      const int v = k / kFloatLanes;
      int64_t row = tile.row[v];
      FloatVec bias_of_row = splat<float>(rows[row]);
      for (int64_t next = tile.next[v]; next < kFloatLanes && ++row < args.height; next += args.width)
        bias_of_row = select_bits(~0u << next, splat<float>(rows[row]), bias_of_row);
      float* at = scores + r * kTile + k;
      store(at, load(at) + (bias_of_row + load(columns + k)));
    }
  }
}

// Adds the gradients of scores [r][:] to those of the bias of query index[r].
template <int kR>
M2F_INLINE void add_bias_gradients(const MaskedAttentionArgs& args, const HeadBias& sums, const BiasTile& tile,
                                   int first, int words, const int32_t* index, const float* grad_scores) {
  for (int r = 0; r < kR; ++r) {
    float* rows = sums.by_row + index[r] * args.height;
    float* columns = sums.by_column + index[r] * stretched(args) + tile.column;
    int64_t row = tile.row[first * kWord / kFloatLanes];
    FloatVec of_row = {};
    for (int k = first * kWord; k < (first + words) * kWord; k += kFloatLanes) {
      const int v = k / kFloatLanes;
      const FloatVec gradient = load(grad_scores + r * kTile + k);
      store(columns + k, load(columns + k) + gradient);
      if (tile.row[v] != row) {  // it ended with the vector before
        rows[row] += horizontal_sum(of_row);
        row = tile.row[v];
        of_row = FloatVec{};
      }
      uint32_t left = ~0u;
      for (int64_t next = tile.next[v]; next < kFloatLanes && row + 1 < args.height; next += args.width) {
        const uint32_t later = ~0u << next;
        rows[row++] += horizontal_sum(of_row + select_bits(left & ~later, gradient, FloatVec{}));
        of_row = FloatVec{};
        left = later;
      }
      of_row += select_bits(left, gradient, FloatVec{});
    }
    rows[row] += horizontal_sum(of_row);
  }
}

// Writes one head's gradients of the bias from `parts` sums, `stride` floats apart, and folds the stretched columns.
inline void store_bias_gradients(const MaskedAttentionArgs& args, int64_t n, int64_t h, const HeadBias& sums,
                                 int64_t parts, int64_t stride) {
  if (!biased(args)) return;
  for (int64_t q = 0; q < args.queries; ++q) {
    float* rows = sums.by_row + q * args.height;
    float* columns = sums.by_column + q * stretched(args);
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < args.height; ++i) rows[i] += rows[part * stride + i];
      for (int64_t i = 0; i < stretched(args); ++i) columns[i] += columns[part * stride + i];
    }
    for (int64_t at = args.width; at < stretched(args); at += args.width)
      for (int64_t i = 0; i < args.width && at + i < stretched(args); ++i) columns[i] += columns[at + i];
    store_run(args.grad_by_row.data, args.grad_by_row.dtype, args.grad_by_row.offset(n, h, q), args.height, rows);
    store_run(args.grad_by_column.data, args.grad_by_column.dtype, args.grad_by_column.offset(n, h, q), args.width,
              columns);
  }
}

}  // namespace
}  // namespace m2f
