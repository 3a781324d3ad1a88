// The launches of the CUDA kernels and their arguments, for bindings that a host's compiler compiles.
#pragma once

#ifdef M2F_CUDA_ON_HOST
#include "cuda_shim.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

#include "dtype.h"
#include "ms_deform_attn/levels.h"

namespace m2f {

// A tensor over [N, Q, H, K], strides in elements. Reference points have levels in place of K, and no heads.
struct Strided {
  const void* data;
  DType dtype;
  bool aligned;  // pairs of elements are aligned to their size; set by the launch
  int64_t n, q, h, k;
};

// Everything a kernel needs. Pointers that are null are not wanted.
struct DeformAttnArgs {
  DType dtype;  // of value, output and grad_output
  int64_t batch;
  int positions, queries, heads, channels;
  Levels levels;
  const int64_t* device_shapes;  // [L, 2] and [L] in device memory; null where `levels` has the sizes
  const int64_t* device_starts;

  const void* value;
  int64_t value_n, value_s, value_h;  // strides in elements, as everywhere here
  Strided points;                     // sampling locations; from offsets: sampling offsets
  Strided weights;                    // attention weights; from offsets: logits
  Strided reference;                  // from offsets only
  int reference_size;                 // 2 or 4
  double offset_scale;

  void* output;  // [N, Q, H * D]

  const void* grad_output;
  int64_t grad_output_n, grad_output_q;
  void* grad_value;      // [N, S, H, D], zeroed, fp32 (fp64)
  void* grad_points;     // [N, Q, H, K, 2], points' dtype
  void* grad_weights;    // [N, Q, H, K], weights' dtype
  void* grad_reference;  // [N, Q, H, L, 2 or 4], fp32 (fp64): not yet summed over heads

  // Geometry, set by the launch.
  int lanes_log2;    // lanes of a group
  int queries_log2;  // queries of a tile
  int tile_width_log2;
  int history;         // values kept per sample for the end of the backward
  int row_lanes_log2;  // lanes that add up one row, in cuda_gather.cuh

  bool lean = false;      // forward: by the kernel of cuda_lean.cuh where it serves the call
  bool gathered = false;  // value gradient: by the kernel of cuda_gather.cuh where it serves the call
};

// What the launch needs to know of the device.
struct DeviceTraits {
  int multiprocessors;
  int architecture;  // 90 for sm_90
};

// Rows of value further apart than this do not fit the kernels' 32-bit stride; such a value has to be copied first.
constexpr int64_t kMaxRowBytes = 0xffffffff;

// Forward if grad_output is null, otherwise backward; on reference points if they are given. At least one query.
void launch_ms_deform_attn(DeformAttnArgs args, const DeviceTraits& device, cudaStream_t stream);

// out[i] = sum[i] rounded to a 16-bit dtype.
void launch_round_gradient(const float* sum, void* out, DType dtype, int64_t count, const DeviceTraits& device,
                           cudaStream_t stream);

// [rows, heads, size] in fp32 (fp64 if `parts_are_double`) -> [rows, size] in dtype.
void launch_sum_over_heads(const void* parts, bool parts_are_double, void* out, DType dtype, int64_t rows, int heads,
                           int size, const DeviceTraits& device, cudaStream_t stream);

}  // namespace m2f
