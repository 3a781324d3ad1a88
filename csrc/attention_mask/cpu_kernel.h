// The interface between the binding (cpu.cpp) and the kernels (cpu_kernel.cpp, compiled once per instruction set).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/rows.h"

namespace m2f {

constexpr int kMaxResizeLevels = 16;

// One level of a resize. Its [h, w] pixels begin at `start` of a plane's output row. `ratio` is 2, 4 or 8 where that
// divides both sides of the input into those of the level, else 0. Then `rows` and `columns` hold the two input indices
// of each output pixel, and the weights are those of the second index.
struct ResizeLevel {
  int64_t height, width, start;
  int ratio;
  const int32_t* rows;         // [2 * height]
  const int32_t* columns;      // [2 * width]
  const float* row_weight;     // [height]
  const float* column_weight;  // [width]
};

struct ResizeArgs {
  int64_t batch, channels, height, width;
  Rows input;   // rows of `width` by (n, c, y)
  Rows output;  // rows of all levels' pixels by (n, c, 0)
  int levels;
  ResizeLevel level[kMaxResizeLevels];
};

struct PredictArgs {
  int64_t batch, queries, channels, keys;
  Rows embed;                 // rows of C by (n, q, 0)
  Rows features;              // rows of S by (n, c, 0)
  const float* packed_embed;  // pack_embed's result, per image
  int32_t* bits;              // [N, Q, words]
  bool* row_any;              // [N, Q], false on entry
};

struct PackArgs {
  int64_t rows, keys;
  const void* mask;  // bool, or `dtype`; rows of S, `stride` apart
  bool logits;
  DType dtype;
  int64_t stride;
  int32_t* bits;
  bool* row_any;
};

struct AttentionMaskKernels {
  // Tasks are planes (n, c). Scratch: one input row and one output row in float.
  void (*resize)(const ResizeArgs&, int64_t first, int64_t last, float* scratch);
  // The size in bytes of one image's packed embeddings; then the function that packs them.
  size_t (*packed_embed)(const PredictArgs&);
  void (*pack_embed)(const PredictArgs&, int64_t image, float* packed);
  // Tasks are (n, group of kKeysPerTask keys).
  size_t (*predict_scratch)(const PredictArgs&);
  void (*predict)(const PredictArgs&, int64_t first, int64_t last, void* scratch);
  // Tasks are rows.
  void (*pack)(const PackArgs&, int64_t first, int64_t last);
};

constexpr int64_t kKeysPerTask = 128;

M2F_DECLARE_VARIANTS(const AttentionMaskKernels&, attention_mask_kernels, ());

}  // namespace m2f
