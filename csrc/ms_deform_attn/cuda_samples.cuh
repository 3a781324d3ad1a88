// Geometry of the CUDA kernels: the level table, the walk over query tiles, and the preparation of samples.
// The head of cuda_kernels.cu, which includes this, states the design.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ms_deform_attn/bilinear.cuh"
#include "ms_deform_attn/cuda_launches.h"
#include "ms_deform_attn/launch.cuh"
#include "ms_deform_attn/vec.cuh"

namespace m2f {

constexpr int kMaxThreads = 256;
constexpr int kSharedLimit = 48 * 1024;
constexpr unsigned kFullWarp = 0xffffffffu;

// ---------------------------------------------------------------- levels and tiles

struct LevelTable {
  int height[kMaxLevels];
  int width[kMaxLevels];
  int start[kMaxLevels];
  int first_point[kMaxLevels + 1];
  int first_tile[kMaxLevels + 1];
  int tiled;  // queries are the positions of the levels, which follow each other
};
constexpr int kTableBytes = (sizeof(LevelTable) + 15) / 16 * 16;

__device__ __forceinline__ int ceil_shift(int x, int log2) { return (x + (1 << log2) - 1) >> log2; }

__device__ __forceinline__ void build_level_table(const DeformAttnArgs& args, LevelTable& table) {
  const int thread = threadIdx.x;
  const int count = args.levels.count;
  if (thread < count) {
    int64_t height = args.levels.height[thread];
    int64_t width = args.levels.width[thread];
    int64_t start = args.levels.start[thread];
    if (args.device_shapes != nullptr) {
      const auto* shapes = reinterpret_cast<const long long*>(args.device_shapes);
      height = __ldg(shapes + 2 * thread);
      width = __ldg(shapes + 2 * thread + 1);
      start = __ldg(reinterpret_cast<const long long*>(args.device_starts) + thread);
      // A level that does not lie within value has no pixels, so it contributes nothing. Known only here, it cannot be
      // an error without waiting for the device, and a trap would take the whole context with it.
      if (height < 1 || width < 1 || start < 0 || start > args.positions || height > (args.positions - start) / width) {
        height = width = start = 0;
      }
    }
    table.height[thread] = static_cast<int>(height);
    table.width[thread] = static_cast<int>(width);
    table.start[thread] = static_cast<int>(start);
  }
  if (thread == 0) table.tiled = args.queries == args.positions;
  __syncthreads();
  if (thread <= count) {
    const int tile_height_log2 = args.queries_log2 - args.tile_width_log2;
    int points = 0;
    int64_t tiles = 0;
    int64_t positions = 0;
    for (int l = 0; l < thread; ++l) {
      points += args.levels.points_per_level[l];
      tiles += static_cast<int64_t>(ceil_shift(table.height[l], tile_height_log2)) *
               ceil_shift(table.width[l], args.tile_width_log2);
      positions += static_cast<int64_t>(table.height[l]) * table.width[l];
    }
    table.first_point[thread] = points;
    table.first_tile[thread] = static_cast<int>(tiles);
    if (positions != (thread < count ? table.start[thread] : args.queries)) table.tiled = 0;
  }
  __syncthreads();
}

// The queries of one tile: a rectangle of a level, or consecutive ones.
struct Tile {
  int level_start, width, height, x, y, width_log2;
  int64_t first;
  int64_t queries;
  bool tiled;

  // The tile's i-th query, -1 where the tile overhangs.
  __device__ __forceinline__ int query(int i) const {
    if (!tiled) return first + i < queries ? static_cast<int>(first + i) : -1;
    const int qx = x + (i & ((1 << width_log2) - 1));
    const int qy = y + (i >> width_log2);
    return qx < width && qy < height ? level_start + qy * width + qx : -1;
  }
};

__device__ __forceinline__ unsigned tile_count(const DeformAttnArgs& args, const LevelTable& table) {
  return table.tiled ? table.first_tile[args.levels.count]
                     : static_cast<unsigned>((static_cast<int64_t>(args.queries) + (1 << args.queries_log2) - 1) >>
                                             args.queries_log2);
}

__device__ __forceinline__ Tile find_tile(const DeformAttnArgs& args, const LevelTable& table, unsigned index) {
  Tile tile{};
  tile.tiled = table.tiled;
  tile.queries = args.queries;
  tile.first = static_cast<int64_t>(index) << args.queries_log2;
  if (table.tiled) {
    int level = 0;
    while (static_cast<int>(index) >= table.first_tile[level + 1]) ++level;
    tile.width_log2 = args.tile_width_log2;
    tile.width = table.width[level];
    tile.height = table.height[level];
    tile.level_start = table.start[level];
    const unsigned local = index - table.first_tile[level];
    const unsigned per_row = ceil_shift(tile.width, args.tile_width_log2);
    tile.y = static_cast<int>(local / per_row) << (args.queries_log2 - args.tile_width_log2);
    tile.x = static_cast<int>(local % per_row) << args.tile_width_log2;
  }
  return tile;
}

// ---------------------------------------------------------------- groups and samples

// Where a thread stands: `member` of its group, which is the warp's `group`-th.
struct Lane {
  int member, group, groups_log2, group_in_block, groups_in_block, warp;

  __device__ __forceinline__ explicit Lane(int lanes_log2) {
    const int lane = threadIdx.x & 31;
    warp = threadIdx.x >> 5;
    member = lane & ((1 << lanes_log2) - 1);
    group = lane >> lanes_log2;
    groups_log2 = 5 - lanes_log2;
    group_in_block = (warp << groups_log2) + group;
    groups_in_block = blockDim.x >> lanes_log2;
  }

  // Sample-major within a warp: the groups' entries of one sample are adjacent, so reading them meets each bank once.
  __device__ __forceinline__ int slot(int sample) const { return (warp << 5) + (sample << groups_log2) + group; }
};

template <typename A>
__device__ __forceinline__ A group_sum(A x, int lanes_log2) {
  for (int offset = 1; offset < 1 << lanes_log2; offset <<= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <typename A>
__device__ __forceinline__ A group_max(A x, int lanes_log2) {
  for (int offset = 1; offset < 1 << lanes_log2; offset <<= 1) x = fmax(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// The sampling tensors as one (image, query, head) sees them.
template <typename A, bool kFromOffsets>
struct Sampler {
  int64_t points, weights, reference;  // index of the first element
  A softmax_max, softmax_scale;

  __device__ __forceinline__ Sampler(const DeformAttnArgs& args, const Lane& lane, int64_t n, int query, int head) {
    points = n * args.points.n + query * args.points.q + head * args.points.h;
    weights = n * args.weights.n + query * args.weights.q + head * args.weights.h;
    if constexpr (kFromOffsets) {
      reference = n * args.reference.n + query * args.reference.q;
      // All lanes of a warp arrive here; groups without a query only take part in the shuffles.
      const int end = query >= 0 ? args.levels.points_total : 0;
      A largest = -INFINITY;
      for (int k = lane.member; k < end; k += 1 << args.lanes_log2) largest = fmax(largest, weight(args, k));
      softmax_max = group_max(largest, args.lanes_log2);
      A sum = 0;
      for (int k = lane.member; k < end; k += 1 << args.lanes_log2) sum += exp(weight(args, k) - softmax_max);
      softmax_scale = 1 / group_sum(sum, args.lanes_log2);
    }
  }

  __device__ __forceinline__ A weight(const DeformAttnArgs& args, int k) const {
    return load_scalar<A>(args.weights.data, args.weights.dtype, weights + k * args.weights.k);
  }

  // The attention weight of sample k.
  __device__ __forceinline__ A attention(const DeformAttnArgs& args, int k) const {
    const A x = weight(args, k);
    if constexpr (kFromOffsets) return exp(x - softmax_max) * softmax_scale;
    return x;
  }

  // Elements 2k and 2k + 1 of the points tensor.
  __device__ __forceinline__ void point(const DeformAttnArgs& args, int k, A& x, A& y) const {
    load_pair(args.points.data, args.points.dtype, args.points.aligned, points + k * args.points.k, x, y);
  }
};

// One sample as the lane that prepares it knows it.
template <typename A>
struct Sample {
  Corners<A> corners;
  A attention;
};

// Pixels per unit of the points tensor, along x and y.
template <typename A, bool kFromOffsets>
__device__ __forceinline__ void pixel_steps(const DeformAttnArgs& args, const LevelTable& table,
                                            const Sampler<A, kFromOffsets>& sampler, int level, A& step_x, A& step_y) {
  step_x = static_cast<A>(table.width[level]);
  step_y = static_cast<A>(table.height[level]);
  if constexpr (kFromOffsets) {
    if (args.reference_size == 4) {
      const int64_t size = sampler.reference + level * args.reference.k + 2;
      const A scale = static_cast<A>(args.offset_scale) / args.levels.points_per_level[level];
      step_x *= load_scalar<A>(args.reference.data, args.reference.dtype, size) * scale;
      step_y *= load_scalar<A>(args.reference.data, args.reference.dtype, size + 1) * scale;
    } else {
      step_x = step_y = 1;
    }
  }
}

// Sample k's place in pixels of its level; outside every level if it is not wanted.
template <typename A, bool kFromOffsets>
__device__ __forceinline__ void read_location(const DeformAttnArgs& args, const LevelTable& table,
                                              const Sampler<A, kFromOffsets>& sampler, bool wanted, int k, int level,
                                              A& x, A& y) {
  x = y = -INFINITY;
  if (!wanted) return;
  sampler.point(args, k, x, y);
  A step_x, step_y;
  pixel_steps(args, table, sampler, level, step_x, step_y);
  x = x * step_x - A(0.5);
  y = y * step_y - A(0.5);
  if constexpr (kFromOffsets) {
    const int64_t index = sampler.reference + level * args.reference.k;
    x += load_scalar<A>(args.reference.data, args.reference.dtype, index) * table.width[level];
    y += load_scalar<A>(args.reference.data, args.reference.dtype, index + 1) * table.height[level];
  }
}

// Sample k of the group; `level` is that of the lane's previous sample, from which the search goes on.
template <typename A, bool kFromOffsets>
__device__ __forceinline__ Sample<A> read_sample(const DeformAttnArgs& args, const LevelTable& table,
                                                 const Sampler<A, kFromOffsets>& sampler, bool wanted, int k,
                                                 int& level) {
  Sample<A> sample;
  int height = 0, width = 0;
  sample.attention = 0;
  if (wanted) {
    while (k >= table.first_point[level + 1]) ++level;
    height = table.height[level];
    width = table.width[level];
  }
  A x, y;
  read_location(args, table, sampler, wanted, k, level, x, y);
  if (wanted) sample.attention = sampler.attention(args, k);
  sample.corners = find_corners(x, y, height, width);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (sample.corners.position.at[i] >= 0) sample.corners.position.at[i] += table.start[level];
  }
  return sample;
}

// The part of value that one lane reads: rows of one image and head, from the lane's first channel on.
template <typename T, int kVec>
struct ValueRows {
  const unsigned char* base;
  unsigned row_bytes;  // the caller sees to it that it fits: kMaxRowBytes

  __device__ __forceinline__ ValueRows(const DeformAttnArgs& args, int64_t n, int head, int channel)
      : base(static_cast<const unsigned char*>(args.value) +
             (n * args.value_n + head * args.value_h + channel) * static_cast<int64_t>(sizeof(T))),
        row_bytes(static_cast<unsigned>(args.value_s * static_cast<int64_t>(sizeof(T)))) {}

  // Zeros, and no access, for an absent corner: a NaN in memory must not meet a weight of zero.
  __device__ __forceinline__ typename Vector<T, kVec>::Raw load(int position, int channel = 0) const {
    auto raw = Vector<T, kVec>::zero();
    if (position >= 0) {
      raw = Vector<T, kVec>::load(advance_rows(base, position, row_bytes) + channel * sizeof(T));
    }
    return raw;
  }
};

// ---------------------------------------------------------------- what accesses arguments allow

inline bool divides(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline bool pairs_aligned(const Strided& x) {
  return x.data != nullptr && divides(x.data, 2 * element_size(x.dtype)) && x.n % 2 == 0 && x.q % 2 == 0 &&
         x.h % 2 == 0 && x.k % 2 == 0;
}

// Whether accesses of `vec` channels fit everything that a lane accesses as vectors.
inline bool allows_vectors(const DeformAttnArgs& args, int vec) {
  const int bytes = vec * element_size(args.dtype);
  bool fits = args.channels % vec == 0 && divides(args.value, bytes);
  for (const int64_t stride : {args.value_n, args.value_s, args.value_h}) fits = fits && stride % vec == 0;
  if (args.grad_output != nullptr) {
    fits = fits && divides(args.grad_output, bytes) && args.grad_output_n % vec == 0 && args.grad_output_q % vec == 0;
  } else {
    fits = fits && divides(args.output, bytes);
  }
  return fits;
}

inline int64_t tiles_of_levels(const Levels& levels, int width_log2, int height_log2) {
  int64_t tiles = 0;
  for (int l = 0; l < levels.count; ++l) {
    tiles += ((levels.height[l] + (1 << height_log2) - 1) >> height_log2) *
             ((levels.width[l] + (1 << width_log2) - 1) >> width_log2);
  }
  return tiles;
}

// A block for each tile of queries, head and image, for which kernels stride over the rest.
inline dim3 tile_grid(const DeformAttnArgs& args) {
  int64_t tiles = ((static_cast<int64_t>(args.queries) - 1) >> args.queries_log2) + 1;
  if (args.queries == args.positions) {
    // Sizes that only the device knows: enough blocks for levels of common shapes; blocks stride over the rest.
    tiles = args.device_shapes != nullptr ? tiles + args.levels.count
                                          : std::max(tiles, tiles_of_levels(args.levels, args.tile_width_log2,
                                                                            args.queries_log2 - args.tile_width_log2));
  }
  tiles = std::min<int64_t>(tiles, 0x7fffffff / args.heads);
  return dim3(static_cast<unsigned>(tiles * args.heads), static_cast<unsigned>(std::min<int64_t>(args.batch, 65535)));
}

}  // namespace m2f
