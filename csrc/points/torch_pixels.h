// Masks and features as planes, read through PyTorch's stable ABI.
#pragma once

#include <vector>

#include "points/pixels.h"
#include "torch/args.h"

namespace m2f {

inline PixelType pixel_type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return PixelType::kFloat64;
    case ScalarType::Float: return PixelType::kFloat32;
    case ScalarType::BFloat16: return PixelType::kBFloat16;
    case ScalarType::Half: return PixelType::kFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte: return PixelType::kByte;
    default: STD_TORCH_CHECK(false, name, ": expected a floating point type, bool or uint8");
  }
}

inline int64_t pixel_bytes(PixelType type) {
  switch (type) {
    case PixelType::kFloat64: return 8;
    case PixelType::kFloat32: return 4;
    case PixelType::kByte: return 1;
    default: return 2;
  }
}

// The tensor itself if its last two axes are contiguous planes, otherwise a contiguous copy.
inline Tensor dense_planes(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  const int64_t height = tensor.size(last - 1), width = tensor.size(last);
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= INT32_MAX / width, name,
                  ": expected at least one and fewer than 2^31 pixels, got ", height, " x ", width);
  const bool dense = (width == 1 || tensor.stride(last) == 1) && (height == 1 || tensor.stride(last - 1) == width);
  return dense ? tensor : torch::stable::contiguous(tensor);
}

// The data of `rows` [M], checked to lie in 0 to `bound` - 1.
inline const int64_t* checked_rows(const Tensor& rows, const char* name, int64_t bound) {
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.is_contiguous(), name,
                  ": expected a contiguous int64 tensor [M]");
  const int64_t* p = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < bound, name, ": expected indices below ", bound, ", got ", p[i]);
  return p;
}

// All targets of one image, from pixels [T, H, W] and, for maps and run lengths, marks (`Targets` in masks.py). The
// result points into both tensors. `pixels` is replaced by a dense copy where it is not dense.
inline std::vector<Target> targets_of(Tensor& pixels, const Tensor* marks) {
  STD_TORCH_CHECK(pixels.dim() == 3, "targets: expected [T, H, W]");
  const int64_t count = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  std::vector<Target> targets(count);
  if (marks == nullptr) {
    pixels = dense_planes(pixels, "targets");
    const PixelType type = pixel_type_of(pixels, "targets");
    const char* data = static_cast<const char*>(pixels.data_ptr());
    for (int64_t t = 0; t < count; ++t)
      targets[t] = {
          TargetKind::kMask, {data + t * pixels.stride(0) * pixel_bytes(type), type, height, width}, 0, nullptr, 0, 0};
    return targets;
  }
  STD_TORCH_CHECK(marks->dim() == 1 && (marks->numel() <= 1 || marks->stride(0) == 1),
                  "targets: expected marks that are contiguous, of rank 1");
  const Plane shape{nullptr, PixelType::kByte, height, width};
  if (marks->scalar_type() == ScalarType::Int) {
    STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= INT32_MAX / width,
                    "targets: expected fewer than 2^31 pixels");
    STD_TORCH_CHECK(marks->numel() >= count + 2, "targets: expected runs of ", count, " targets");
    const int32_t* runs = static_cast<const int32_t*>(marks->data_ptr());
    const int32_t *firsts = runs + 1, *ends = runs + count + 2;
    const int64_t all = marks->numel() - count - 2;
    for (int64_t t = 0; t < count; ++t) {
      STD_TORCH_CHECK(0 <= firsts[t] && firsts[t] + 2 <= firsts[t + 1] && firsts[t + 1] <= all,
                      "targets: expected at least two ends of runs for each target");
      targets[t] = {TargetKind::kRuns, shape, 0, ends + firsts[t], firsts[t + 1] - firsts[t], runs[0]};
    }
    return targets;
  }
  STD_TORCH_CHECK(marks->scalar_type() == ScalarType::Long && marks->numel() == count,
                  "targets: expected the int64 ids of a map, one per target");
  pixels = dense_planes(pixels, "targets");
  TargetKind kind = TargetKind::kMap64;
  switch (pixels.scalar_type()) {
    case ScalarType::Byte: kind = TargetKind::kMap8; break;
    case ScalarType::Short: kind = TargetKind::kMap16; break;
    case ScalarType::Int: kind = TargetKind::kMap32; break;
    case ScalarType::Long: break;
    default: STD_TORCH_CHECK(false, "targets: expected a map of int64, int32, int16 or uint8");
  }
  Plane plane = shape;  // all targets share the first plane, the map
  plane.data = count ? pixels.data_ptr() : nullptr;
  const int64_t* ids = static_cast<const int64_t*>(marks->data_ptr());
  for (int64_t t = 0; t < count; ++t) targets[t] = {kind, plane, ids[t], nullptr, 0, 0};
  return targets;
}

inline Tensor float_points(const Tensor& points, const char* name) {
  STD_TORCH_CHECK(points.dim() == 3 && points.size(2) == 2 && points.scalar_type() == ScalarType::Float, name,
                  ": expected a float32 tensor [., K, 2]");
  return points.is_contiguous() ? points : torch::stable::contiguous(points);
}

}  // namespace m2f
