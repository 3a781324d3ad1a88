// Planes of pixels of any type that masks come in. For files compiled once per instruction set, but for PixelType.
#pragma once

#include <cstdint>

namespace m2f {

// kIndex: int32, of targets only; a pixel is 1 where it holds the number of its own plane, else 0.
enum class PixelType : int { kFloat64, kFloat32, kBFloat16, kFloat16, kByte, kIndex };

// One plane of contiguous rows.
struct Plane {
  const void* data;
  PixelType type;
  int64_t height, width;
  int32_t number = 0;  // of a plane of kIndex
};

struct IndexPixels {
  const int32_t* data;
  int32_t number;
};

}  // namespace m2f
