// Planes of pixels of any type that masks come in. For files compiled once per instruction set, but for PixelType.
#pragma once

#include <cstdint>

namespace m2f {

enum class PixelType : int { kFloat64, kFloat32, kBFloat16, kFloat16, kByte };

// One plane of contiguous rows.
struct Plane {
  const void* data;
  PixelType type;
  int64_t height, width;
};

}  // namespace m2f
