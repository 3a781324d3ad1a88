// Multi-scale deformable attention on CUDA, forward and backward: kernels and their launches, without PyTorch.
//
// Work and floors, bf16, N = 2, levels 32^2 + 64^2 + 128^2 (S = Q = 21504), H = 8 heads of D = 32, K = 3 * 4 samples:
//   (query, head) pairs  2 * 21504 * 8 = 344 064; samples 4.13 M; corners 16.5 M of 64 bytes = 1.06 GB gathered
//   device memory        value 22.0 MB + output 22.0 MB + offsets 16.5 MB + logits 8.3 MB = 69 MB (94 MB where
//                        locations and weights are fp32): 21 us at an H100's 3.35 TB/s, 14 us at an H200's 4.8 TB/s
//   L1                   1.06 GB / (132 SMs * 128 B * 1.755 GHz = 29.6 TB/s) = 36 us: the floor when offsets are local
//   L2                   1.06 GB / ~5.5 TB/s = 190 us: the floor when every corner misses L1 (random offsets);
//                        31 us with each line used 6.2 times (below)
//   arithmetic           0.53 G fused multiply-adds = 16 us at 67 TFLOP/s; unpacking bf16 takes as many instructions
//                        again, so issue slots weigh more: 102 per warp and sample (counted in sm_90's code), 53 M in
//                        all, over 132 SMs * 4 * 1.755 GHz = 57 us
// Those rates are data-sheet figures. An H100 took 134 us with local offsets and 152 us with random ones.
//
// Lanes. A group of 2^k lanes serves one (query, head); each lane holds 16 bytes of the channels, so that a bf16
// head of 32 takes 4 lanes and a warp serves 8 queries, an fp32 head 8 lanes and 4 queries. A corner is one 64-byte
// (128-byte) segment: full sectors. Backward a lane holds 4 channels in either dtype. Where D, strides or alignment
// forbid vectors, a lane holds one element.
//
// Preparing samples. Lane i of a group reads sample i of a round, turns it into four positions and four weights
// (32 bytes) and puts them in shared memory; then all lanes walk the round's samples, reading them back with two
// broadcast 16-byte loads that hit all banks once. Softmax and locations are computed once per sample instead of once
// per lane and sample; shuffles would take eight instructions for what two loads do. Rounds keep shared memory at
// 32 bytes per thread (8 KB per block) whatever K is, which leaves the rest of the SM's 256 KB to L1.
//
// Loads in flight. A sample's four corners are independent: a lane issues four 16-byte loads before it uses the first,
// and the next sample's while it uses them. 32 warps per SM (64 registers) have 64 KB requested; hiding a 250 ns L2
// latency at 5.5 TB/s / 132 takes 10 KB.
//
// Walking queries. In an encoder (Q == S) query i sits at position i. A block takes a tile of 64 queries, 8 x 8 on
// their level, and one head. Counted for offsets of about two pixels, each line fetched serves 6.2 corners, against
// 2.7 for 32 queries in raster order. Same head, because other heads read other bytes of a position: adding heads to a
// block adds footprint and no reuse, while adding queries adds reuse. All threads of a block walk the levels in the
// same order, so that at any time its working set is one level's: 64 * 4 * 4 / 6.2 = 165 lines of 128 bytes, 21 KB,
// and the four blocks of an SM fit L1. Heads vary fastest over blockIdx.x: the blocks that share lines of value and
// sectors of offsets run at the same time, and meet in L2. Any other Q is walked in raster order.
//
// Where level sizes lie in device memory each block reads and checks them; blocks stride over tiles, so the grid does
// not depend on the sizes and nothing synchronises with the host.
//
// Backward. A lane's four dot products with grad_output are summed over the group by shuffles that also transpose (3
// for 4 lanes, 4 for 8, instead of 8 and 12), and the lane which prepared a sample turns its four dots into gradients.
// Value gradients are added in fp32 (fp64): 16.5 M corners * 128 B = 2.1 GB of reductions, the floor of the backward.
// On sm_90 and later they are 16 bytes per instruction and lane. Before, each lane of a group holds one channel, so
// that a warp's scalar reductions are consecutive. Everything but the value gradient is deterministic: the softmax's
// sum over samples and reference points' over points live in shared memory, the sum over heads in a second pass.
// Duplicate corners within a warp are not merged: that takes 8 shuffles per corner and step to save at most one
// reduction of two 16-byte halves. cuda_gather.cuh merges them over a tile of queries.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "ms_deform_attn/cuda_gather.cuh"
#include "ms_deform_attn/cuda_lean.cuh"
#include "ms_deform_attn/cuda_samples.cuh"

namespace m2f {

// ---------------------------------------------------------------- forward

// Blocks per SM that the registers have to leave room for: as many as compile without spills.
template <typename T, int kVec>
__host__ __device__ constexpr int forward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (kVec == 8) return 3;  // addresses take more registers there
#endif
  return sizeof(T) == 8 ? 2 : 4;
}

template <typename T, int kVec, bool kFromOffsets>
__global__ void __launch_bounds__(kMaxThreads, forward_blocks<T, kVec>())
    ms_deform_attn_forward_kernel(const __grid_constant__ DeformAttnArgs args) {
  using A = Accumulator<T>;
  M2F_DYNAMIC_SHARED(shared);
  LevelTable& table = *reinterpret_cast<LevelTable*>(shared);
  auto* positions = reinterpret_cast<Quad<int>*>(shared + kTableBytes);
  auto* weights = reinterpret_cast<Quad<A>*>(positions + blockDim.x);
  build_level_table(args, table);

  const Lane lane(args.lanes_log2);
  const int lanes = 1 << args.lanes_log2;
  const int samples = args.levels.points_total;
  const int head = blockIdx.x % args.heads;
  const unsigned tiles = tile_count(args, table);
  for (int64_t n = blockIdx.y; n < args.batch; n += gridDim.y) {
    for (unsigned t = blockIdx.x / args.heads; t < tiles; t += gridDim.x / args.heads) {
      const Tile tile = find_tile(args, table, t);
      for (int first = 0; first < 1 << args.queries_log2; first += lane.groups_in_block) {
        const int query = tile.query(first + lane.group_in_block);
        const Sampler<A, kFromOffsets> sampler(args, lane, n, query, head);
        // One turn, unless a head has more channels than a warp holds.
        for (int chunk = 0; chunk < args.channels; chunk += lanes * kVec) {
          const int channel = chunk + lane.member * kVec;
          const ValueRows<T, kVec> rows(args, n, head, channel);
          A sum[kVec] = {};
          int level = 0;
          for (int k = 0; k < samples; k += lanes) {
            const int own = k + lane.member;
            const Sample<A> sample = read_sample(args, table, sampler, query >= 0 && own < samples, own, level);
            __syncwarp();  // the previous round has been read
            positions[lane.slot(lane.member)] = sample.corners.position;
            weights[lane.slot(lane.member)] = corner_weights(sample.corners, sample.attention);
            __syncwarp();
            if (channel >= args.channels) continue;
            const int count = min(lanes, samples - k);
#pragma unroll 2
            for (int i = 0; i < count; ++i) {
              const Quad<int> position = positions[lane.slot(i)];
              const Quad<A> weight = weights[lane.slot(i)];
              typename Vector<T, kVec>::Raw raw[4];
#pragma unroll
              for (int c = 0; c < 4; ++c) raw[c] = rows.load(position.at[c]);
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                A corner[kVec];
                Vector<T, kVec>::unpack(raw[c], corner);
#pragma unroll
                for (int v = 0; v < kVec; ++v) sum[v] += weight.at[c] * corner[v];
              }
            }
          }
          if (query >= 0 && channel < args.channels) {
            T* out = static_cast<T*>(args.output) + ((n * args.queries + query) * args.heads + head) * args.channels +
                     channel;
            Vector<T, kVec>::store(out, sum);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- backward

// Sums each of four values over the group and leaves them in `out`. With at least four lanes the first two steps also
// transpose: a lane gives away the values that it will not finish.
template <typename A>
__device__ __forceinline__ void reduce_dots(A (&dot)[4], int lanes_log2, int member, Quad<A>& out) {
  if (lanes_log2 >= 2) {
    const bool odd = member & 1;
    const bool upper = member & 2;
    A first = odd ? dot[1] : dot[0];
    A second = odd ? dot[3] : dot[2];
    first += __shfl_xor_sync(kFullWarp, odd ? dot[0] : dot[1], 1);
    second += __shfl_xor_sync(kFullWarp, odd ? dot[2] : dot[3], 1);
    A sum = upper ? second : first;
    sum += __shfl_xor_sync(kFullWarp, upper ? first : second, 2);
    for (int offset = 4; offset < 1 << lanes_log2; offset <<= 1) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    if (member < 4) out.at[member] = sum;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) dot[c] = group_sum(dot[c], lanes_log2);
    if (member == 0) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out.at[c] = dot[c];
    }
  }
}

template <typename T, int kVec, bool kFromOffsets>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 || kFromOffsets ? 2 : 3)
    ms_deform_attn_backward_kernel(const __grid_constant__ DeformAttnArgs args) {
  using A = Accumulator<T>;
  M2F_DYNAMIC_SHARED(shared);
  LevelTable& table = *reinterpret_cast<LevelTable*>(shared);
  auto* positions = reinterpret_cast<Quad<int>*>(shared + kTableBytes);
  auto* weights = reinterpret_cast<Quad<A>*>(positions + blockDim.x);
  auto* dots = weights + blockDim.x;
  auto* prepared = dots + blockDim.x;  // fx, fy and attention weight of the lane's sample: off its registers meanwhile
  build_level_table(args, table);

  const Lane lane(args.lanes_log2);
  const int lanes = 1 << args.lanes_log2;
  const int samples = args.levels.points_total;
  // Per group: gradients of the attention weights, then where wanted of the normalised locations' x and y.
  A* const history =
      reinterpret_cast<A*>(prepared + blockDim.x) + static_cast<int64_t>(lane.group_in_block) * samples * args.history;
  const bool needs_value = args.grad_value != nullptr;
  const bool needs_sampling = args.grad_points != nullptr;
  const bool needs_reference = kFromOffsets && args.grad_reference != nullptr;
  const bool needs_dots = needs_sampling || needs_reference;
  const bool one_chunk = args.channels <= lanes * kVec;
  const unsigned grad_row_bytes = static_cast<unsigned>(args.heads) * args.channels * sizeof(A);
  const int head = blockIdx.x % args.heads;
  const unsigned tiles = tile_count(args, table);
  for (int64_t n = blockIdx.y; n < args.batch; n += gridDim.y) {
    for (unsigned t = blockIdx.x / args.heads; t < tiles; t += gridDim.x / args.heads) {
      const Tile tile = find_tile(args, table, t);
      for (int first = 0; first < 1 << args.queries_log2; first += lane.groups_in_block) {
        const int query = tile.query(first + lane.group_in_block);
        const bool active = query >= 0;
        const Sampler<A, kFromOffsets> sampler(args, lane, n, query, head);
        const int64_t group_index = (n * args.queries + query) * args.heads + head;
        const T* grad_output = static_cast<const T*>(args.grad_output) + n * args.grad_output_n +
                               query * args.grad_output_q + static_cast<int64_t>(head) * args.channels;
        const ValueRows<T, kVec> rows(args, n, head, 0);
        A* const grad_value =
            static_cast<A*>(args.grad_value) + (n * args.positions * args.heads + head) * args.channels;

        auto raw_grad = Vector<T, kVec>::zero();
        if (active && one_chunk && lane.member * kVec < args.channels) {
          raw_grad = Vector<T, kVec>::load(grad_output + lane.member * kVec);
        }
        A weighted_sum = 0;  // over this lane's samples, of weight * gradient of the weight
        int level = 0;
        for (int k = 0; k < samples; k += lanes) {
          const int own = k + lane.member;
          const bool wanted = active && own < samples;
          {
            const Sample<A> sample = read_sample(args, table, sampler, wanted, own, level);
            __syncwarp();  // the previous round has been read
            positions[lane.slot(lane.member)] = sample.corners.position;
            weights[lane.slot(lane.member)] = corner_weights(sample.corners, sample.attention);
            prepared[threadIdx.x] = {{sample.corners.fx, sample.corners.fy, sample.attention}};
            __syncwarp();
          }
          const int count = min(lanes, samples - k);
          for (int i = 0; i < count; ++i) {
            const Quad<int> position = positions[lane.slot(i)];
            A dot[4] = {};
            for (int channel = lane.member * kVec; channel < args.channels; channel += lanes * kVec) {
              typename Vector<T, kVec>::Raw raw[4];
              if (needs_dots) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  raw[c] = rows.load(position.at[c], channel);
                }
              }
              if (!one_chunk && active) raw_grad = Vector<T, kVec>::load(grad_output + channel);
              A grad[kVec];
              Vector<T, kVec>::unpack(raw_grad, grad);
              if (needs_dots) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  A corner[kVec];
                  Vector<T, kVec>::unpack(raw[c], corner);
#pragma unroll
                  for (int v = 0; v < kVec; ++v) dot[c] += grad[v] * corner[v];
                }
              }
              if (needs_value) {
                const Quad<A> weight = weights[lane.slot(i)];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  if (position.at[c] < 0) continue;
                  A addend[kVec];
#pragma unroll
                  for (int v = 0; v < kVec; ++v) addend[v] = weight.at[c] * grad[v];
                  atomic_add<A, kVec>(advance_rows(grad_value, position.at[c], grad_row_bytes) + channel, addend);
                }
              }
            }
            if (needs_dots) reduce_dots(dot, args.lanes_log2, lane.member, dots[lane.slot(i)]);
          }
          if (!needs_dots) continue;
          __syncwarp();
          if (!wanted) continue;
          const Quad<int> position = positions[lane.slot(lane.member)];
          const bool contributes = (position.at[0] & position.at[1] & position.at[2] & position.at[3]) >= 0;
          const A attention = prepared[threadIdx.x].at[2];
          A grad_weight = 0, grad_x = 0, grad_y = 0;  // with respect to pixels
          A grad_point_x = 0, grad_point_y = 0;
          if (contributes) {  // otherwise some factors may not be finite, and must not meet a zero
            const Quad<A> dot = dots[lane.slot(lane.member)];
            const A fx = prepared[threadIdx.x].at[0], fy = prepared[threadIdx.x].at[1];
            const A top = (1 - fx) * dot.at[0] + fx * dot.at[1];
            const A bottom = (1 - fx) * dot.at[2] + fx * dot.at[3];
            grad_weight = (1 - fy) * top + fy * bottom;
            grad_x = attention * ((1 - fy) * (dot.at[1] - dot.at[0]) + fy * (dot.at[3] - dot.at[2]));
            grad_y = attention * (bottom - top);
            A step_x, step_y;
            pixel_steps(args, table, sampler, level, step_x, step_y);
            grad_point_x = grad_x * step_x;
            grad_point_y = grad_y * step_y;
          }
          if (needs_sampling) {
            store_pair(args.grad_points, args.points.dtype, 2 * (group_index * samples + own), grad_point_x,
                       grad_point_y);
          }
          if constexpr (kFromOffsets) {
            weighted_sum += attention * grad_weight;
            history[own] = grad_weight;
            if (needs_reference) {
              history[samples + own] = grad_x * table.width[level];
              history[2 * samples + own] = grad_y * table.height[level];
            }
          } else {
            store_scalar(args.grad_weights, args.weights.dtype, group_index * samples + own, grad_weight);
          }
        }

        if constexpr (kFromOffsets) {
          if (needs_sampling) {
            // The softmax's Jacobian: weight * (gradient - weighted mean of the gradients).
            const A mean = group_sum(weighted_sum, args.lanes_log2);
            for (int k = lane.member; active && k < samples; k += lanes) {
              store_scalar(args.grad_weights, args.weights.dtype, group_index * samples + k,
                           sampler.attention(args, k) * (history[k] - mean));
            }
          }
          if (needs_reference) {
            __syncwarp();
            const int size = args.reference_size;
            for (int i = lane.member; active && i < args.levels.count * size; i += lanes) {
              const int l = i / size;
              const int axis = i % size;  // x, y, width, height
              const A* grad = history + ((axis & 1) + 1) * samples;
              A sum = 0;
              for (int k = table.first_point[l]; k < table.first_point[l + 1]; ++k) {
                A scale = 1;
                if (axis >= 2) {
                  A x, y;
                  sampler.point(args, k, x, y);
                  scale = (axis == 2 ? x : y) * static_cast<A>(args.offset_scale) / args.levels.points_per_level[l];
                }
                if (grad[k] != 0) sum += grad[k] * scale;  // samples outside may have an infinite offset
              }
              static_cast<A*>(args.grad_reference)[group_index * args.levels.count * size + i] = sum;
            }
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- after the backward

// The accumulated value gradient in value's dtype.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) round_gradient(const float* sum, T* out, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < count; i += stride) {
    if (i + 8 <= count) {
      float x[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 part = __ldg(reinterpret_cast<const float4*>(sum + i) + half);
        x[4 * half] = part.x;
        x[4 * half + 1] = part.y;
        x[4 * half + 2] = part.z;
        x[4 * half + 3] = part.w;
      }
      Vector<T, 8>::store(out + i, x);
    } else {
      for (int64_t tail = i; tail < count; ++tail) store_element(out + tail, __ldg(sum + tail));
    }
  }
}

// [rows, heads, size] -> [rows, size], in a fixed order.
template <typename A>
__global__ void __launch_bounds__(kMaxThreads)
    sum_over_heads(const A* parts, void* out, DType dtype, int64_t rows, int heads, int size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * size; i += stride) {
    const int64_t row = i / size;
    const A* part = parts + row * heads * size + i % size;
    A sum = 0;
    for (int h = 0; h < heads; ++h) sum += __ldg(part + static_cast<int64_t>(h) * size);
    store_scalar(out, dtype, i, sum);
  }
}

// ---------------------------------------------------------------- launches

struct Geometry {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
};

// Chooses lanes, threads and tiles; writes them into args.
inline Geometry choose_geometry(DeformAttnArgs& args, int vec, bool backward, bool from_offsets,
                                const DeviceTraits& device) {
  const int accumulator_bytes = args.dtype == DType::kFloat64 ? 8 : 4;
  args.points.aligned = pairs_aligned(args.points);
  args.history = backward && from_offsets ? (args.grad_reference != nullptr ? 3 : 1) : 0;
  args.lanes_log2 = 0;
  while (args.lanes_log2 < 5 && (vec << args.lanes_log2) < args.channels) ++args.lanes_log2;

  int64_t threads = kMaxThreads;
  int64_t shared = 0;
  const auto measure = [&] {
    shared = kTableBytes + threads * (16 + 4 * accumulator_bytes * (backward ? 3 : 1)) +
             (threads >> args.lanes_log2) * args.levels.points_total * args.history * accumulator_bytes;
  };
  const auto blocks = [&] {
    return ((static_cast<int64_t>(args.queries) * args.heads * args.batch) << args.lanes_log2) / threads;
  };
  // Few queries, as in a decoder: smaller blocks reach more multiprocessors.
  while (threads > 64 && blocks() < 4 * device.multiprocessors) threads /= 2;
  // Very many samples per query: fewer groups share the block's memory.
  for (measure(); shared > kSharedLimit; measure()) {
    if (threads > 32) {
      threads /= 2;
    } else if (args.lanes_log2 < 5) {
      ++args.lanes_log2;
    } else {
      throw std::runtime_error("attention_logits: too many samples per query and head for the gradient kernel");
    }
  }

  int groups_log2 = -args.lanes_log2;
  for (int64_t i = threads; i > 1; i /= 2) ++groups_log2;
  // A tile of 64 queries keeps its lines in L1 over several passes of the block.
  args.queries_log2 = args.queries == args.positions && threads == kMaxThreads ? std::max(6, groups_log2) : groups_log2;
  args.tile_width_log2 = (args.queries_log2 + 1) / 2;
  return {tile_grid(args), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared)};
}

template <typename T, int kVec>
void launch_forward(DeformAttnArgs& args, bool from_offsets, const DeviceTraits& device, cudaStream_t stream) {
  const Geometry geometry = choose_geometry(args, kVec, false, from_offsets, device);
  launch(from_offsets ? ms_deform_attn_forward_kernel<T, kVec, true> : ms_deform_attn_forward_kernel<T, kVec, false>,
         geometry.grid, geometry.block, geometry.shared_bytes, stream, args);
}

template <typename T, int kVec>
void launch_backward(DeformAttnArgs& args, bool from_offsets, const DeviceTraits& device, cudaStream_t stream) {
  const Geometry geometry = choose_geometry(args, kVec, true, from_offsets, device);
  launch(from_offsets ? ms_deform_attn_backward_kernel<T, kVec, true> : ms_deform_attn_backward_kernel<T, kVec, false>,
         geometry.grid, geometry.block, geometry.shared_bytes, stream, args);
}

// 16 bytes a lane: 16 / sizeof(T) channels of value forward. Backward 4 channels whatever the dtype, 16 bytes of the
// fp32 sums: with 8, the two reductions of a lane each touch every other 16 bytes, and took twice as long (H100).
template <typename T>
void launch_widest(DeformAttnArgs& args, const DeviceTraits& device, bool from_offsets, cudaStream_t stream) {
  if (args.grad_output == nullptr) {
    constexpr int kVec = 16 / sizeof(T);
    return allows_vectors(args, kVec) ? launch_forward<T, kVec>(args, from_offsets, device, stream)
                                      : launch_forward<T, 1>(args, from_offsets, device, stream);
  }
  // Scalar reductions want consecutive lanes on consecutive channels.
  const bool scalar_reductions = args.grad_value != nullptr && device.architecture < 90;
  return allows_vectors(args, 4) && !scalar_reductions ? launch_backward<T, 4>(args, from_offsets, device, stream)
                                                       : launch_backward<T, 1>(args, from_offsets, device, stream);
}

void launch_ms_deform_attn(DeformAttnArgs args, const DeviceTraits& device, cudaStream_t stream) {
  const bool from_offsets = args.reference.data != nullptr;
  if (args.grad_output == nullptr && args.lean && launch_lean_forward(args, device, stream)) return;
  if (args.gathered && launch_gathered_value_gradient(args, device, stream)) {
    args.grad_value = nullptr;
    if (args.grad_points == nullptr && args.grad_reference == nullptr) return;
  }
  if (args.dtype == DType::kFloat64) {
    return args.grad_output == nullptr ? launch_forward<double, 1>(args, from_offsets, device, stream)
                                       : launch_backward<double, 1>(args, from_offsets, device, stream);
  }
  with_type(args.dtype,
            [&](auto type) { launch_widest<typename decltype(type)::Type>(args, device, from_offsets, stream); });
}

inline dim3 grid_for(int64_t threads, const DeviceTraits& device) {
  return dim3(static_cast<unsigned>(
      std::min<int64_t>((threads + kMaxThreads - 1) / kMaxThreads, 16 * static_cast<int64_t>(device.multiprocessors))));
}

void launch_round_gradient(const float* sum, void* out, DType dtype, int64_t count, const DeviceTraits& device,
                           cudaStream_t stream) {
  const dim3 grid = grid_for((count + 7) / 8, device);
  if (dtype == DType::kBFloat16) {
    launch(round_gradient<__nv_bfloat16>, grid, dim3(kMaxThreads), 0, stream, sum, static_cast<__nv_bfloat16*>(out),
           count);
  } else {
    launch(round_gradient<__half>, grid, dim3(kMaxThreads), 0, stream, sum, static_cast<__half*>(out), count);
  }
}

void launch_sum_over_heads(const void* parts, bool parts_are_double, void* out, DType dtype, int64_t rows, int heads,
                           int size, const DeviceTraits& device, cudaStream_t stream) {
  const dim3 grid = grid_for(rows * size, device);
  if (parts_are_double) {
    launch(sum_over_heads<double>, grid, dim3(kMaxThreads), 0, stream, static_cast<const double*>(parts), out, dtype,
           rows, heads, size);
  } else {
    launch(sum_over_heads<float>, grid, dim3(kMaxThreads), 0, stream, static_cast<const float*>(parts), out, dtype,
           rows, heads, size);
  }
}

}  // namespace m2f
