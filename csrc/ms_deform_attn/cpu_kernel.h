// The interface between the binding (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per instruction set).
// Plain data only: a translation unit built for AVX-512 must not share inline functions with the others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "ms_deform_attn/levels.h"

namespace m2f {

struct MSDeformAttnArgs {
  int64_t batch, positions, heads, channels, queries;
  Levels levels;
  // Sampling tensors are rows of K = levels.points_total points per (n, q, h).
  Rows value;      // rows of D by (n, s, h)
  Rows locations;  // locations, or offsets, rows of 2K
  Rows weights;    // weights, or logits, rows of K
  // from_offsets only: rows of 2 or 4 by (n, q, level).
  bool from_offsets;
  Rows reference;
  int reference_dim;
  double offset_scale;

  const int32_t* order;  // the order in which to visit the queries, or null
  int64_t parts;         // the number of tasks that share the queries of one (n, h)
  bool packed;           // true: gather from a packed copy of each head's value

  Rows output;  // rows of D by (n, q, h)

  // Backward.
  Rows grad_output;  // rows of D by (n, q, h)
  Rows grad_value, grad_locations, grad_weights;
  bool needs_value, needs_sampling;
  void* grad_panels;     // [N*H*parts] panels where parts > 1, in arithmetic type
  void* grad_reference;  // [N, H, Q, L, reference_dim] in arithmetic type, or null
};

// Tasks are numbered (n, h, part), part fastest. `scratch` is 64-byte aligned and private to the calling thread.
struct MSDeformAttnKernels {
  int vector_bytes;
  size_t (*forward_scratch)(const MSDeformAttnArgs&);
  void (*forward)(const MSDeformAttnArgs&, int64_t first_task, int64_t last_task, void* scratch);
  size_t (*backward_scratch)(const MSDeformAttnArgs&);
  void (*backward)(const MSDeformAttnArgs&, int64_t first_task, int64_t last_task, void* scratch);
  // The size of one panel of the value gradient; then the function that sums the panels over parts. Its tasks are
  // (n, h, pixel row of any level). Scratch holds one row of channels, padded to whole vectors.
  size_t (*grad_panel)(const MSDeformAttnArgs&);
  void (*combine_parts)(const MSDeformAttnArgs&, int64_t first_task, int64_t last_task, void* scratch);
};

M2F_DECLARE_VARIANTS(const MSDeformAttnKernels&, ms_deform_attn_kernels, ());

}  // namespace m2f
