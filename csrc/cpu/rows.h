// Tensors as kernels see them: plain data, shared by translation units that do not see PyTorch's headers.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace m2f {

// Rows of contiguous elements, addressed by three strides (in elements).
struct Rows {
  void* data;
  DType dtype;
  int64_t stride[3];

  int64_t offset(int64_t i, int64_t j, int64_t k) const { return i * stride[0] + j * stride[1] + k * stride[2]; }
};

}  // namespace m2f
