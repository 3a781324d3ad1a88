// The interface between the binding (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per instruction set).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/capability.h"
#include "dtype.h"
#include "points/pixels.h"

namespace m2f {

struct PointSampleArgs {
  int64_t batch, channels, height, width, k;
  const void* input;  // planes of contiguous rows, by (n, c)
  PixelType type;
  int64_t stride[2];    // of n and c, in pixels
  const float* points;  // [N, K, 2]
  int64_t parts;        // number of parts into which the points of one image are divided
  void* output;         // [N, C, K]
  DType output_type;

  // Backward only. `output` then holds the gradients of the samples; this gets those of planes [N, C, h, w].
  void* grad_input;
};

// Samples of targets that are not masks; all have one kind and size.
struct TargetSampleArgs {
  int64_t count, k;
  const Target* targets;
  const float* points;  // [K, 2]
  float* output;        // [count, K]
};

struct UncertainPointsArgs {
  int64_t m, planes, height, width;
  const void* logits;
  PixelType type;
  int64_t stride;  // from plane to plane
  const int64_t* rows;
  uint64_t seed;
  uint32_t first_stream;
  int64_t candidates, keep, fresh;
  float* points;  // [M, keep + fresh, 2]
};

struct PointSampleKernels {
  // Tasks are (n, part, c), c fastest.
  size_t (*sample_scratch)(const PointSampleArgs&);
  void (*sample)(const PointSampleArgs&, int64_t first, int64_t last, void* scratch);
  // Tasks are stretches of kPointsPerStretch points, so that a map's pixels are read once for all targets.
  void (*sample_targets)(const TargetSampleArgs&, int64_t first, int64_t last);
  // Tasks are (n, c). Scratch is one plane of floats, used if planes are of 16 bits.
  void (*sample_backward)(const PointSampleArgs&, int64_t first, int64_t last, float* scratch);
  // Tasks are masks.
  size_t (*uncertain_scratch)(const UncertainPointsArgs&);
  void (*uncertain)(const UncertainPointsArgs&, int64_t first, int64_t last, void* scratch);
};

constexpr int64_t kPointsPerStretch = 512;

M2F_DECLARE_VARIANTS(const PointSampleKernels&, point_sample_kernels, ());

}  // namespace m2f
