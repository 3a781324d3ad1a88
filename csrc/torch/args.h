// Reads arguments through PyTorch's stable ABI, for the bindings of every operator. The checks in Python come first and
// have the better messages; these protect memory where torch.ops.m2f is called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "dtype.h"

namespace m2f {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16");
  }
}

inline void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (const int64_t size : expected) same = same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(same, name, ": unexpected shape");
}

// The tensor itself if the last axis has stride 1, otherwise a contiguous copy.
inline Tensor unit_stride_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor empty_like_sizes(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes));
}

}  // namespace m2f
