// The interface between the binding (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per instruction set).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/rows.h"

namespace m2f {

constexpr int64_t kTileKeys = 64;  // two words of bits

// Rows whose elements are `stride` apart.
struct BiasRows {
  Rows rows;
  int64_t stride;
};

struct MaskedAttentionArgs {
  int64_t batch, heads, queries, keys, channels;
  double scale;
  Rows query, key, value;  // rows of D by (n, h, position)
  const int32_t* bits;     // [N, masked, words]
  const bool* row_any;     // [N, masked]
  int64_t words;
  int64_t masked;  // queries [0, masked) have bits; the others attend everywhere

  // A bias: height * width = keys, by_row rows of height and by_column rows of width by (n, h, q). Without one both are
  // 0.
  int64_t height, width;
  BiasRows by_row, by_column;

  int64_t parts;        // number of parts that the keys are divided into
  int64_t head_groups;  // number of groups that the heads are divided into; does not change a result
  float* partial;       // if parts > 1: the results of each (n, h, part)

  Rows output;       // rows of D by (n, h, q)
  float* logsumexp;  // [N, H, Q], natural logarithm

  // Backward.
  Rows grad_output, saved_output;
  const float* saved_logsumexp;
  Rows grad_query, grad_key, grad_value;
  Rows grad_by_row, grad_by_column;
};

// Tasks are numbered (n, group of heads, part), part fastest. `scratch` is 64-byte aligned and private to the calling
// thread.
struct MaskedAttentionKernels {
  size_t (*forward_scratch)(const MaskedAttentionArgs&);
  void (*forward)(const MaskedAttentionArgs&, int64_t first_task, int64_t last_task, void* scratch);
  size_t (*backward_scratch)(const MaskedAttentionArgs&);
  void (*backward)(const MaskedAttentionArgs&, int64_t first_task, int64_t last_task, void* scratch);
  // The number of floats per (n, h, part); then the function that sums over parts, whose tasks are (n, h).
  int64_t (*forward_partial)(const MaskedAttentionArgs&);
  void (*combine_forward)(const MaskedAttentionArgs&, int64_t first, int64_t last, void* scratch);
  int64_t (*backward_partial)(const MaskedAttentionArgs&);
  void (*combine_backward)(const MaskedAttentionArgs&, int64_t first, int64_t last, void* scratch);
};

M2F_DECLARE_VARIANTS(const MaskedAttentionKernels&, masked_attention_kernels, ());

}  // namespace m2f
