// A second forward kernel of multi-scale deformable attention, for the shapes that models have: 32 channels per head,
// points of each level in fours, level sizes known on the host, sampling tensors packed over samples. Everything else,
// and everything until a GPU has shown this one right and faster, takes the kernel of cuda_kernels.cu, whose head
// explains lanes, preparation and tiles; here is what differs.
//
// Instructions bind the forward, not bytes: so a warp executes as few as possible per sample.
//   - Dtypes are template parameters, so that nothing branches on them and loads are free to move.
//   - Four lanes serve a (query, head) in every dtype, 8 channels each: a fp32 lane loads two vectors of 16 bytes. A
//     round is four samples of one level, so its size and place come from constant memory, uniformly.
//   - The next round's points and weights are requested before this round's corners are.
//   - A corner outside the level is replaced by its neighbour inside, with weight 0, so no corner needs a predicate.
//   Only
//     a warp with a sample that contributes nothing takes a loop with a branch, which skips it; such warps are rare.
//   - From offsets, weights are not normalised: the sum of their exponentials divides the output once.
//   - A block serves one tile: no loop, no level table in shared memory.
//
// An infinite value at the border of a level may give NaN here where the other kernel gives infinity: 0 * infinity.
#pragma once

#include <algorithm>

#include "ms_deform_attn/cuda_samples.cuh"

namespace m2f {

constexpr int kLeanLanes = 4;
constexpr int kLeanChannels = 32;
constexpr int kLeanMaxRounds = 16;
constexpr unsigned kNothing = ~0u;  // no corner lies there: offsets are multiples of 16

// The level of one round of four samples. Members are read two words at a time, in this order.
struct alignas(8) LeanRound {
  float width, height;
  int last_x, last_y;         // width - 1, height - 1
  unsigned first, row_bytes;  // bytes of the level's first position, and from one row of pixels to the next
  unsigned reference;         // bytes to the level's reference point
  float box_scale;            // of offsets, where reference points are boxes
};

struct LeanTiles {
  int start, width, height;
  int first_tile, per_row;
  unsigned reciprocal;  // of per_row: ceil(2^32 / per_row)
};

// A sampling tensor; strides in bytes.
struct LeanTensor {
  const unsigned char* data;
  int64_t n, h;
  unsigned q;

  __device__ __forceinline__ const unsigned char* at(int64_t image, int head, unsigned query, unsigned byte) const {
    // What is uniform over the block first.
    return advance_rows(data + image * n + head * h, query, q) + byte;
  }
};

struct LeanArgs {
  LeanTensor points, weights, reference;
  const unsigned char* value;
  int64_t value_n, value_h;  // in bytes
  unsigned position_bytes;   // from one position to the next
  unsigned char* output;     // [N, Q, H, D]
  int queries, heads;
  int rounds;
  int tiled_levels;  // 0: queries are walked as they come
  bool boxes;        // reference points are boxes
  int queries_log2, tile_width_log2;
  LeanRound round[kLeanMaxRounds];
  LeanTiles tiles[kMaxLevels];
};

// Two neighbouring scalars of a sampling tensor.
template <typename S>
struct SamplingPair;

template <>
struct SamplingPair<float> {
  using Raw = float2;
  static __device__ __forceinline__ void unpack(float2 raw, float& x, float& y) { x = raw.x, y = raw.y; }
};

template <typename S>
struct SamplingPair {
  using Raw = unsigned int;
  static __device__ __forceinline__ void unpack(unsigned int raw, float& x, float& y) { Pair16<S>::unpack(raw, x, y); }
};

template <typename S>
__device__ __forceinline__ typename SamplingPair<S>::Raw load_raw_pair(const unsigned char* p) {
  return __ldg(reinterpret_cast<const typename SamplingPair<S>::Raw*>(p));
}

// The same pointer, after a shuffle of each lane with itself. The assembler cannot see through the shuffle, so it keeps
// the pointer in two registers instead of computing it again in every round.
__device__ __forceinline__ const unsigned char* keep(const unsigned char* pointer) {
  const auto bits = reinterpret_cast<unsigned long long>(pointer);
  return reinterpret_cast<const unsigned char*>(__shfl_xor_sync(kFullWarp, bits, 0));
}

// The tile's query that this thread's group serves, -1 where the tile overhangs.
__device__ __forceinline__ int lean_query(const LeanArgs& args, int i) {
  const int tile = static_cast<int>(blockIdx.y);
  if (args.tiled_levels == 0) {
    const int64_t query = (static_cast<int64_t>(tile) << args.queries_log2) + i;
    return query < args.queries ? static_cast<int>(query) : -1;
  }
  int level = 0;
#pragma unroll 1
  while (level + 1 < args.tiled_levels && tile >= args.tiles[level + 1].first_tile) ++level;
  const LeanTiles& tiles = args.tiles[level];
  const int local = tile - tiles.first_tile;
  const int row = tiles.per_row == 1 ? local : static_cast<int>(__umulhi(local, tiles.reciprocal));
  const int x = ((local - row * tiles.per_row) << args.tile_width_log2) + (i & ((1 << args.tile_width_log2) - 1));
  const int y = (row << (args.queries_log2 - args.tile_width_log2)) + (i >> args.tile_width_log2);
  return x < tiles.width && y < tiles.height ? tiles.start + y * tiles.width + x : -1;
}

// As many blocks per SM as compile without spills.
__host__ __device__ constexpr int lean_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 3;
#endif
  return 4;
}

// S: dtype of locations and weights, or of offsets and logits; R: of reference points.
template <typename T, typename S, typename R, bool kFromOffsets>
__global__ void __launch_bounds__(kMaxThreads, lean_blocks())
    ms_deform_attn_forward_lean_kernel(const __grid_constant__ LeanArgs args) {
  constexpr int kParts = sizeof(T) / 2;  // vectors of 16 bytes that a lane loads of a corner
  constexpr float kLog2E = 1.4426950408889634f;
  M2F_DYNAMIC_SHARED(shared);
  const int member = threadIdx.x & 3;
  const int group = (threadIdx.x & 31) >> 2;
  auto* const offsets = reinterpret_cast<Quad<unsigned>*>(shared) + (threadIdx.x & ~31u) + group;
  auto* const weights = reinterpret_cast<Quad<float>*>(shared) + blockDim.x + (threadIdx.x & ~31u) + group;

  const int head = blockIdx.x;
  const int64_t n = blockIdx.z;
  const int query = lean_query(args, threadIdx.x >> 2);
  const int source = max(query, 0);  // a group without a query repeats another's work and stores nothing
  const unsigned char* point = args.points.at(n, head, source, 2 * sizeof(S) * member);
  const unsigned char* logit = args.weights.at(n, head, source, sizeof(S) * member);
  const unsigned char* const reference = kFromOffsets ? args.reference.at(n, 0, source, 0) : nullptr;
  // Of 128-byte rows neighbouring groups read different halves at a time, which lie in different banks.
  const unsigned half = kParts == 2 ? group & 1 : 0;
  const unsigned char* const base = keep(args.value + n * args.value_n + head * args.value_h + 16 * member + 64 * half);
  const unsigned char* const other = kParts == 2 ? keep(base + 64 - 128 * static_cast<int>(half)) : base;
  const auto load_weight = [](const unsigned char* p) { return load_element(reinterpret_cast<const S*>(p)); };

  auto raw_point = load_raw_pair<S>(point);
  auto raw_weight = load_weight(logit);
  float largest = to_accumulator(raw_weight);
  if constexpr (kFromOffsets) {
#pragma unroll 1
    for (int r = 1; r < args.rounds; ++r) {
      largest = fmaxf(largest, to_accumulator(load_weight(logit + kLeanLanes * sizeof(S) * r)));
    }
    largest = kLog2E * group_max(largest, 2);
  }
  float total = 0;
  float sum[8] = {};

#pragma unroll 1
  for (int r = 0; r < args.rounds; ++r) {
    const LeanRound& level = args.round[r];
    float x, y;
    SamplingPair<S>::unpack(raw_point, x, y);
    float weight = to_accumulator(raw_weight);
    const unsigned next = kLeanLanes * sizeof(S) * min(r + 1, args.rounds - 1);  // the last again: no branch
    raw_point = load_raw_pair<S>(point + 2 * next);
    raw_weight = load_weight(logit + next);
    if constexpr (kFromOffsets) {
      weight = exp2f(kLog2E * weight - largest);
      total += weight;
      float centre_x, centre_y;
      SamplingPair<R>::unpack(load_raw_pair<R>(reference + level.reference), centre_x, centre_y);
      if (args.boxes) {
        float box_x, box_y;
        SamplingPair<R>::unpack(load_raw_pair<R>(reference + level.reference + 2 * sizeof(R)), box_x, box_y);
        x *= level.width * (box_x * level.box_scale);
        y *= level.height * (box_y * level.box_scale);
      }
      x = x - 0.5f + centre_x * level.width;
      y = y - 0.5f + centre_y * level.height;
    } else {
      x = x * level.width - 0.5f;
      y = y * level.height - 0.5f;
    }
    const bool contributes = x > -1.0f && x < level.width && y > -1.0f && y < level.height;
    const float x_floor = floorf(x), y_floor = floorf(y);
    const int x0 = static_cast<int>(x_floor), y0 = static_cast<int>(y_floor);
    const float fx = x - x_floor, fy = y - y_floor;
    const float left = x0 >= 0 ? 1 - fx : 0.0f;
    const float right = x0 < level.last_x ? fx : 0.0f;
    const float top = y0 >= 0 ? (1 - fy) * weight : 0.0f;
    const float bottom = y0 < level.last_y ? fy * weight : 0.0f;
    const unsigned upper = level.first + max(y0, 0) * level.row_bytes;
    const unsigned lower = level.first + min(y0 + 1, level.last_y) * level.row_bytes;
    const unsigned first = max(x0, 0) * args.position_bytes;
    const unsigned second = min(x0 + 1, level.last_x) * args.position_bytes;
    const bool whole = __all_sync(kFullWarp, contributes);
    __syncwarp();  // the previous round has been read
    offsets[8 * member] = {{contributes ? upper + first : kNothing, upper + second, lower + first, lower + second}};
    weights[8 * member] = {{left * top, right * top, left * bottom, right * bottom}};
    __syncwarp();

    const auto gather = [&](int i) {
      const Quad<unsigned> offset = offsets[8 * i];
      if (!whole && offset.at[0] == kNothing) return;
      const Quad<float> scale = weights[8 * i];
      uint4 raw[4][kParts];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        raw[c][0] = Raw16::load(base + offset.at[c]);
        if constexpr (kParts == 2) raw[c][1] = Raw16::load(other + offset.at[c]);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        constexpr int kVec = 16 / sizeof(T);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          float corner[kVec];
          Vector<T, kVec>::unpack(raw[c][p], corner);
#pragma unroll
          for (int v = 0; v < kVec; ++v) sum[p * kVec + v] += scale.at[c] * corner[v];
        }
      }
    };
    if (whole) {
#pragma unroll(kParts == 1 ? kLeanLanes : 1)  // more would spill
      for (int i = 0; i < kLeanLanes; ++i) gather(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < kLeanLanes; ++i) gather(i);
    }
  }

  if constexpr (kFromOffsets) {
    const float scale = 1 / group_sum(total, 2);
#pragma unroll
    for (int v = 0; v < 8; ++v) sum[v] *= scale;
  }
  if (query < 0) return;
  const unsigned out_row = args.heads * static_cast<unsigned>(kLeanChannels * sizeof(T));
  unsigned char* const image = args.output + n * args.queries * out_row + head * (kLeanChannels * sizeof(T));
  T* const output = reinterpret_cast<T*>(advance_rows(image, query, out_row));
  constexpr int kVec = 16 / sizeof(T);
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    float part[kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) part[v] = sum[p * kVec + v];
    Vector<T, kVec>::store(output + kVec * (kLeanLanes * (p ^ half) + member), part);
  }
}

// ---------------------------------------------------------------- launch

// The arguments of the kernel above; false where it does not serve the call. `args.points.aligned` is set.
inline bool lean_arguments(const DeformAttnArgs& args, LeanArgs& lean) {
  constexpr int64_t kLimit = 0xffffffff;
  const bool from_offsets = args.reference.data != nullptr;
  const int bytes = element_size(args.dtype);
  const auto known = [&](DType dtype) { return dtype == DType::kFloat32 || dtype == args.dtype; };
  if (args.dtype == DType::kFloat64 || args.channels != kLeanChannels || args.device_shapes != nullptr ||
      args.batch > 65535 || !known(args.points.dtype) || args.weights.dtype != args.points.dtype ||
      !args.points.aligned || args.points.k != 2 || args.weights.k != 1 ||
      args.value_s * bytes * static_cast<int64_t>(args.positions) > kLimit) {
    return false;
  }
  const auto tensor = [&](const Strided& x, LeanTensor& out) {
    const int64_t size = element_size(x.dtype);
    out = {static_cast<const unsigned char*>(x.data), x.n * size, x.h * size, static_cast<unsigned>(x.q * size)};
    return x.q * size <= kLimit && x.k * size * args.levels.points_total <= kLimit;
  };
  if (!tensor(args.points, lean.points) || !tensor(args.weights, lean.weights)) return false;
  if (from_offsets) {
    const bool same = args.reference.dtype == args.points.dtype || args.reference.dtype == DType::kFloat32;
    if (!same || !pairs_aligned(args.reference) || !tensor(args.reference, lean.reference)) return false;
  }
  lean.value = static_cast<const unsigned char*>(args.value);
  lean.value_n = args.value_n * bytes;
  lean.value_h = args.value_h * bytes;
  lean.position_bytes = static_cast<unsigned>(args.value_s * bytes);
  lean.output = static_cast<unsigned char*>(args.output);
  lean.queries = args.queries;
  lean.heads = args.heads;
  lean.boxes = args.reference_size == 4;
  lean.rounds = 0;
  for (int l = 0; l < args.levels.count; ++l) {
    const int64_t width = args.levels.width[l], height = args.levels.height[l];
    const int rounds = args.levels.points_per_level[l] / kLeanLanes;
    // Sizes that a float holds exactly.
    if (args.levels.points_per_level[l] % kLeanLanes != 0 || rounds > kLeanMaxRounds - lean.rounds || width > 1 << 24 ||
        height > 1 << 24) {
      return false;
    }
    for (int i = 0; i < rounds; ++i) {
      LeanRound& round = lean.round[lean.rounds++];
      round.width = static_cast<float>(width);
      round.height = static_cast<float>(height);
      round.last_x = static_cast<int>(width - 1);
      round.last_y = static_cast<int>(height - 1);
      round.first = static_cast<unsigned>(args.levels.start[l] * lean.position_bytes);
      round.row_bytes = static_cast<unsigned>(width * lean.position_bytes);
      round.reference =
          from_offsets ? static_cast<unsigned>(l * args.reference.k * element_size(args.reference.dtype)) : 0;
      round.box_scale = static_cast<float>(args.offset_scale) / args.levels.points_per_level[l];
    }
  }
  return true;
}

// Walks the queries of the levels in tiles where queries are their positions; false where there are too many.
inline bool lean_tiles(const DeformAttnArgs& args, int threads, LeanArgs& lean, unsigned& tiles) {
  lean.queries_log2 = -2;  // log2 of 4 lanes
  for (int i = threads; i > 1; i /= 2) ++lean.queries_log2;
  lean.tile_width_log2 = (lean.queries_log2 + 1) / 2;
  const auto count = [](int64_t size, int log2) { return (size + (int64_t{1} << log2) - 1) >> log2; };
  lean.tiled_levels = args.queries == args.positions ? args.levels.count : 0;
  int64_t first = 0, position = 0;
  for (int l = 0; l < lean.tiled_levels; ++l) {
    const int64_t per_row = count(args.levels.width[l], lean.tile_width_log2);
    lean.tiles[l] = {static_cast<int>(args.levels.start[l]),
                     static_cast<int>(args.levels.width[l]),
                     static_cast<int>(args.levels.height[l]),
                     static_cast<int>(first),
                     static_cast<int>(per_row),
                     static_cast<unsigned>(((int64_t{1} << 32) + per_row - 1) / per_row)};
    if (args.levels.start[l] != position) {  // the levels do not follow each other
      lean.tiled_levels = 0;
      break;
    }
    position += args.levels.width[l] * args.levels.height[l];
    first += per_row * count(args.levels.height[l], lean.queries_log2 - lean.tile_width_log2);
  }
  if (lean.tiled_levels == 0) first = count(args.queries, lean.queries_log2);
  tiles = static_cast<unsigned>(std::min<int64_t>(first, 65536));
  return first <= 65535;
}

template <typename T, typename S>
void launch_lean(const LeanArgs& lean, const DeformAttnArgs& args, dim3 grid, int threads, cudaStream_t stream) {
  const size_t shared = 2 * sizeof(Quad<float>) * threads;
  auto* kernel = ms_deform_attn_forward_lean_kernel<T, S, S, false>;
  if (args.reference.data != nullptr) {
    kernel = args.reference.dtype == DType::kFloat32 ? ms_deform_attn_forward_lean_kernel<T, S, float, true>
                                                     : ms_deform_attn_forward_lean_kernel<T, S, S, true>;
  }
  launch(kernel, grid, dim3(threads), shared, stream, lean);
}

template <typename T>
void launch_lean(const LeanArgs& lean, const DeformAttnArgs& args, dim3 grid, int threads, cudaStream_t stream) {
  return args.points.dtype == DType::kFloat32 ? launch_lean<T, float>(lean, args, grid, threads, stream)
                                              : launch_lean<T, T>(lean, args, grid, threads, stream);
}

// The forward by the kernel above; false, and nothing is launched, where it does not serve the call.
inline bool launch_lean_forward(DeformAttnArgs args, const DeviceTraits& device, cudaStream_t stream) {
  args.points.aligned = pairs_aligned(args.points);
  if (args.dtype == DType::kFloat64 || !allows_vectors(args, 16 / element_size(args.dtype))) return false;
  LeanArgs lean{};
  if (!lean_arguments(args, lean)) return false;
  // Few queries, as in a decoder: smaller blocks reach more multiprocessors.
  int threads = kMaxThreads;
  const int64_t lanes = static_cast<int64_t>(args.queries) * args.heads * args.batch * kLeanLanes;
  while (threads > 64 && lanes / threads < 4 * static_cast<int64_t>(device.multiprocessors)) threads /= 2;
  unsigned tiles = 0;
  if (!lean_tiles(args, threads, lean, tiles)) return false;
  const dim3 grid(static_cast<unsigned>(args.heads), tiles, static_cast<unsigned>(args.batch));
  with_type(args.dtype,
            [&](auto type) { launch_lean<typename decltype(type)::Type>(lean, args, grid, threads, stream); });
  return true;
}

}  // namespace m2f
