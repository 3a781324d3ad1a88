// Masks and features as planes, read through PyTorch's stable ABI.
#pragma once

#include "common/pixels.h"
#include "common/torch_args.h"

namespace m2f {

inline PixelType pixel_type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return PixelType::kFloat64;
    case ScalarType::Float: return PixelType::kFloat32;
    case ScalarType::BFloat16: return PixelType::kBFloat16;
    case ScalarType::Half: return PixelType::kFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return PixelType::kByte;
    case ScalarType::Int: return PixelType::kIndex;
    default: STD_TORCH_CHECK(false, name, ": expected a floating point type, bool or uint8");
  }
}

// The type of what is predicted.
inline PixelType logit_type_of(const Tensor& tensor, const char* name) {
  const PixelType type = pixel_type_of(tensor, name);
  STD_TORCH_CHECK(type != PixelType::kIndex, name, ": expected a floating point type");
  return type;
}

inline int64_t pixel_bytes(PixelType type) {
  switch (type) {
    case PixelType::kFloat64: return 8;
    case PixelType::kFloat32:
    case PixelType::kIndex: return 4;
    case PixelType::kByte: return 1;
    default: return 2;
  }
}

// Whole planes of contiguous rows in the last two axes, at the price of a copy only where they are not.
inline Tensor dense_planes(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  const int64_t height = tensor.size(last - 1), width = tensor.size(last);
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= INT32_MAX / width, name,
                  ": expected at least one and fewer than 2^31 pixels, got ", height, " x ", width);
  const bool dense = (width == 1 || tensor.stride(last) == 1) && (height == 1 || tensor.stride(last - 1) == width);
  return dense ? tensor : torch::stable::contiguous(tensor);
}

// [M] numbers from 0 to `bound` - 1.
inline const int64_t* checked_rows(const Tensor& rows, const char* name, int64_t bound) {
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.is_contiguous(), name,
                  ": expected a contiguous int64 tensor [M]");
  const int64_t* p = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < bound, name, ": expected indices below ", bound, ", got ", p[i]);
  return p;
}

inline Tensor float_points(const Tensor& points, const char* name) {
  STD_TORCH_CHECK(points.dim() == 3 && points.size(2) == 2 && points.scalar_type() == ScalarType::Float, name,
                  ": expected a float32 tensor [., K, 2]");
  return points.is_contiguous() ? points : torch::stable::contiguous(points);
}

}  // namespace m2f
