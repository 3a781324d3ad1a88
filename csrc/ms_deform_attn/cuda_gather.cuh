// The value gradient of multi-scale deformable attention, each row of a tile added once: for encoders, whose queries
// are the positions of the levels. The kernel of cuda_kernels.cu, which serves everything else and everything until a
// GPU has shown this one right and faster, adds each corner of each sample by itself: 2866 rows of a head per tile of
// 8 x 8 queries, of which about 380 differ where samples are near their queries. L2 adds 110 G sectors a second, which
// bounds that kernel.
//
// A block takes one tile of queries and one head, and four samples of one level at a time for each query: a sample per
// thread. Their corners are sorted by pixel, by counting, in a window of shared memory about the samples' mean. Then a
// group of lanes takes a pixel, multiplies its terms with their queries' rows of grad_output, which are in shared
// memory, and adds the sum to memory with one reduction per lane. No term is written before. Corners outside the window
// are added one by one, as they would be without this kernel: samples at random places cost no more reductions than
// before.
#pragma once

#include <algorithm>

#include "ms_deform_attn/cuda_samples.cuh"

namespace m2f {

constexpr int kGatherLanesLog2 = 2;    // of those that prepare the samples of one query
constexpr int kGatherQueriesLog2 = 6;  // of a tile
constexpr int kGatherSideLog2 = 5;     // of the window
constexpr int kGatherSide = 1 << kGatherSideLog2;
constexpr int kGatherPixels = kGatherSide * kGatherSide;
constexpr int kGatherCorners = 4 * kMaxThreads;
constexpr int kGatherWarps = kMaxThreads / 32;
static_assert(kMaxThreads >> kGatherLanesLog2 == 1 << kGatherQueriesLog2, "one sample per thread");
static_assert(kGatherPixels == 4 * kMaxThreads, "four pixels per thread");

// A corner's share of its query's row of grad_output, which lies `pack` packs from the first.
struct alignas(8) GatherTerm {
  float weight;
  int pack;
};

template <int kVec>
struct alignas(4 * kVec) GatherPack {
  float at[kVec];
};

// Shared memory, but for the rows of grad_output, which follow.
struct alignas(16) GatherShared {
  LevelTable table;
  alignas(16) Quad<float> of_warp[kGatherWarps];
  alignas(16) int totals[kGatherWarps];
  int rows;                                  // pixels of the window that have a corner
  int outside;                               // corners outside the window
  alignas(16) int first[kGatherPixels + 1];  // how many corners a pixel has; then the first of them among the sorted
  GatherTerm terms[kGatherCorners];          // sorted; those outside from the end on
  unsigned short pixel[kGatherPixels];       // of each row
  int position[kGatherCorners];              // in value, of each corner outside, from the end on
  alignas(16) unsigned char samplers[kMaxThreads * sizeof(Sampler<float, true>)];
};

// The sums of three numbers over the block, in every thread. The caller sees to it that `of_warp` is free.
__device__ __forceinline__ Quad<float> block_sum(GatherShared& shared, float a, float b, float c) {
  Quad<float> sum{{group_sum(a, 5), group_sum(b, 5), group_sum(c, 5), 0}};
  if ((threadIdx.x & 31) == 0) shared.of_warp[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = shared.of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kGatherWarps; ++warp) {
    const Quad<float> other = shared.of_warp[warp];
#pragma unroll
    for (int i = 0; i < 3; ++i) sum.at[i] += other.at[i];
  }
  return sum;
}

// Replaces the numbers of corners in `first` by their sums over the pixels before.
__device__ __forceinline__ void sum_pixels(GatherShared& shared) {
  auto* const own = reinterpret_cast<int4*>(shared.first) + threadIdx.x;
  const int4 counts = *own;
  const int sum = counts.x + counts.y + counts.z + counts.w;
  const int lane = threadIdx.x & 31;
  int upto = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(kFullWarp, upto, offset);
    if (lane >= offset) upto += other;
  }
  if (lane == 31) shared.totals[threadIdx.x >> 5] = upto;
  __syncthreads();
  int before = upto - sum;
#pragma unroll
  for (int warp = 0; warp < kGatherWarps; ++warp) {
    const int total = shared.totals[warp];  // not under the condition: so they are read four at a time
    before += warp < static_cast<int>(threadIdx.x >> 5) ? total : 0;
  }
  *own = make_int4(before, before + counts.x, before + counts.x + counts.y, before + counts.x + counts.y + counts.z);
  if (threadIdx.x == kMaxThreads - 1) shared.first[kGatherPixels] = before + sum;
}

template <typename T, int kVec, bool kFromOffsets>
__global__ void __launch_bounds__(kMaxThreads, 3)
    ms_deform_attn_gathered_value_gradient_kernel(const __grid_constant__ DeformAttnArgs args) {
  M2F_DYNAMIC_SHARED(memory);
  GatherShared& shared = *reinterpret_cast<GatherShared*>(memory);
  LevelTable& table = shared.table;
  auto* const grads = reinterpret_cast<GatherPack<kVec>*>(memory + sizeof(GatherShared));
  build_level_table(args, table);

  const Lane lane(kGatherLanesLog2);  // args.lanes_log2, too
  const Lane row(args.row_lanes_log2);
  const int row_lanes = 1 << args.row_lanes_log2;
  const int packs = args.channels / kVec;
  const unsigned grad_row_bytes = static_cast<unsigned>(args.heads) * args.channels * sizeof(float);
  const int head = blockIdx.x % args.heads;
  const unsigned tiles = tile_count(args, table);
  for (int64_t n = blockIdx.y; n < args.batch; n += gridDim.y) {
    float* const grad_value =
        static_cast<float*>(args.grad_value) + (n * args.positions * args.heads + head) * args.channels;
    for (unsigned t = blockIdx.x / args.heads; t < tiles; t += gridDim.x / args.heads) {
      const Tile tile = find_tile(args, table, t);
      // The last barrier of the tile before has been passed: its rows have been read.
      for (int i = row.group_in_block; i < 1 << kGatherQueriesLog2; i += row.groups_in_block) {
        const int source = tile.query(i);
        const T* grad_output = static_cast<const T*>(args.grad_output) + n * args.grad_output_n +
                               max(source, 0) * args.grad_output_q + static_cast<int64_t>(head) * args.channels;
        for (int p = row.member; source >= 0 && p < packs; p += row_lanes) {
          Vector<T, kVec>::unpack(Vector<T, kVec>::load(grad_output + p * kVec), grads[i * packs + p].at);
        }
      }
      const int query = tile.query(lane.group_in_block);
      // Off the registers while rows are added up.
      auto& sampler = reinterpret_cast<Sampler<float, kFromOffsets>*>(shared.samplers)[threadIdx.x];
      sampler = Sampler<float, kFromOffsets>(args, lane, n, query, head);
#pragma unroll 1
      for (int level = 0; level < args.levels.count; ++level) {
        const int end = table.first_point[level + 1];
#pragma unroll 1
        for (int start = table.first_point[level]; start < end; start += 1 << kGatherLanesLog2) {
          const int k = start + lane.member;
          const int width = table.width[level], height = table.height[level];
          float x, y;
          read_location(args, table, sampler, query >= 0 && k < end, k, level, x, y);
          const Corners<float> corners = find_corners(x, y, height, width);
          // The window.
          const float one = corners.contributes ? 1.0f : 0.0f;
          const float x_floor = corners.contributes ? floorf(x) : 0.0f,
                      y_floor = corners.contributes ? floorf(y) : 0.0f;
          reinterpret_cast<int4*>(shared.first)[threadIdx.x] = make_int4(0, 0, 0, 0);
          if (threadIdx.x == 0) shared.rows = shared.outside = 0;
          const Quad<float> sum = block_sum(shared, x_floor, y_floor, one);
          if (sum.at[2] == 0) {
            __syncthreads();  // all have seen it
            continue;
          }
          const int left = static_cast<int>(sum.at[0] / sum.at[2]) + 1 - kGatherSide / 2;
          const int top = static_cast<int>(sum.at[1] / sum.at[2]) + 1 - kGatherSide / 2;

          // Sort by pixel.
          const int corner_x = static_cast<int>(x_floor) - left, corner_y = static_cast<int>(y_floor) - top;
          int place[4], pixel[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int wx = corner_x + (c & 1), wy = corner_y + (c >> 1);
            const bool within = (static_cast<unsigned>(wx) | static_cast<unsigned>(wy)) < kGatherSide;
            pixel[c] = within ? (wy << kGatherSideLog2) + wx : -1;
            if (corners.position.at[c] < 0) continue;
            place[c] = shared_increment(within ? shared.first + pixel[c] : &shared.outside);
            if (within && place[c] == 0) {
              shared.pixel[shared_increment(&shared.rows)] = static_cast<unsigned short>(pixel[c]);
            }
          }
          __syncthreads();
          sum_pixels(shared);
          __syncthreads();
          if (corners.contributes) {
            const Quad<float> weights = corner_weights(corners, sampler.attention(args, k));
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              if (corners.position.at[c] < 0) continue;
              const int at = pixel[c] >= 0 ? shared.first[pixel[c]] + place[c] : kGatherCorners - 1 - place[c];
              shared.terms[at] = {weights.at[c], lane.group_in_block * packs};
              if (pixel[c] < 0) shared.position[at] = corners.position.at[c];
            }
          }
          __syncthreads();

          // Add up.
          float* const grad_level = advance_rows(grad_value, table.start[level], grad_row_bytes);
          const int rows = shared.rows, outside = shared.outside;
          for (int p = row.member; p < packs; p += row_lanes) {
            for (int r = row.group_in_block; r < rows; r += row.groups_in_block) {
              const int own = shared.pixel[r];
              const int stop = shared.first[own + 1];
              float total[kVec] = {};
#pragma unroll 2
              for (int i = shared.first[own]; i < stop; ++i) {
                const GatherTerm term = shared.terms[i];
                const GatherPack<kVec> grad = grads[term.pack + p];
#pragma unroll
                for (int v = 0; v < kVec; ++v) total[v] += term.weight * grad.at[v];
              }
              const int position = (top + (own >> kGatherSideLog2)) * width + left + (own & (kGatherSide - 1));
              atomic_add<float, kVec>(advance_rows(grad_level, position, grad_row_bytes) + p * kVec, total);
            }
            for (int i = kGatherCorners - 1 - row.group_in_block; i >= kGatherCorners - outside;
                 i -= row.groups_in_block) {
              const GatherTerm term = shared.terms[i];
              const GatherPack<kVec> grad = grads[term.pack + p];
              float addend[kVec];
#pragma unroll
              for (int v = 0; v < kVec; ++v) addend[v] = term.weight * grad.at[v];
              atomic_add<float, kVec>(advance_rows(grad_level, shared.position[i], grad_row_bytes) + p * kVec, addend);
            }
          }
          __syncthreads();  // sorted corners have been read
        }
      }
      __syncthreads();  // the rows of grad_output, too, where no level has a round
    }
  }
}

// ---------------------------------------------------------------- launch

template <typename T, int kVec>
void launch_gathered(const DeformAttnArgs& args, dim3 grid, size_t shared_bytes, cudaStream_t stream) {
  launch(args.reference.data != nullptr ? ms_deform_attn_gathered_value_gradient_kernel<T, kVec, true>
                                        : ms_deform_attn_gathered_value_gradient_kernel<T, kVec, false>,
         grid, dim3(kMaxThreads), shared_bytes, stream, args);
}

template <typename T>
void launch_gathered(DeformAttnArgs& args, dim3 grid, size_t shared_bytes, const DeviceTraits& device,
                     cudaStream_t stream) {
  // Scalar reductions want consecutive lanes on consecutive channels.
  const int vec = device.architecture < 90 ? 1 : 4;
  args.row_lanes_log2 = 0;
  while (args.row_lanes_log2 < 5 && (vec << args.row_lanes_log2) < args.channels) ++args.row_lanes_log2;
  return vec == 1 ? launch_gathered<T, 1>(args, grid, shared_bytes, stream)
                  : launch_gathered<T, 4>(args, grid, shared_bytes, stream);
}

// The value gradient by the kernel above; false, and nothing is launched, where it does not serve the call.
inline bool launch_gathered_value_gradient(DeformAttnArgs args, const DeviceTraits& device, cudaStream_t stream) {
  const size_t shared_bytes =
      sizeof(GatherShared) + (sizeof(float) << kGatherQueriesLog2) * static_cast<size_t>(args.channels);
  if (args.grad_value == nullptr || args.dtype == DType::kFloat64 || args.queries != args.positions ||
      !allows_vectors(args, 4) || shared_bytes > kSharedLimit) {
    return false;
  }
  args.points.aligned = pairs_aligned(args.points);
  args.lanes_log2 = kGatherLanesLog2;
  args.queries_log2 = kGatherQueriesLog2;
  args.tile_width_log2 = kGatherQueriesLog2 / 2;
  const dim3 grid = tile_grid(args);
  with_type(args.dtype, [&](auto type) {
    launch_gathered<typename decltype(type)::Type>(args, grid, shared_bytes, device, stream);
  });
  return true;
}

}  // namespace m2f
