// The interface between the binding (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per instruction set).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/capability.h"
#include "points/pixels.h"

namespace m2f {

struct MatchingCostArgs {
  int64_t queries, t, k;
  const float *logits, *labels;  // [Q, K], [T, K]
  const double* label_sums;      // [T]
  float *cross_entropy, *dice;   // [Q, T]
};

struct PointLossArgs {
  int64_t m, k, height, width;
  const void* logits;  // planes of contiguous rows
  PixelType type;
  int64_t stride;               // from plane to plane
  const int64_t* rows;          // [M]
  const Target* targets;        // [M]
  const float* points;          // [M, K, 2]
  float *probability, *labels;  // [M, K]
  float *cross_entropy, *dice;  // [M]
};

struct PointLossBackwardArgs {
  int64_t k, height, width;
  const int64_t* order;  // masks by plane: those of plane p are order[start[p]] ... order[start[p + 1] - 1]
  const int64_t* start;  // [planes + 1]
  const float* points;   // [M, K, 2]
  const float *probability, *labels;            // [M, K]
  const float *grad_cross_entropy, *grad_dice;  // [M]
  float* grad_logits;                           // [planes, h, w]
};

struct PointLossKernels {
  // Tasks are blocks of kQueriesPerTask queries.
  size_t (*cost_scratch)(const MatchingCostArgs&);
  void (*cost)(const MatchingCostArgs&, int64_t first, int64_t last, void* scratch);
  // Tasks are masks.
  void (*loss)(const PointLossArgs&, int64_t first, int64_t last);
  // Tasks are planes.
  void (*loss_backward)(const PointLossBackwardArgs&, int64_t first, int64_t last);
};

constexpr int64_t kQueriesPerTask = 8;

M2F_DECLARE_VARIANTS(const PointLossKernels&, point_loss_kernels, ());

}  // namespace m2f
