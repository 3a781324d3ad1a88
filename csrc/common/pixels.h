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

// What a target is: a mask of its own, the pixels of a map that have its id, or where its runs end.
enum class TargetKind : int { kMask, kMap8, kMap16, kMap32, kMap64, kRuns };

struct Target {
  TargetKind kind;
  Plane plane;  // of the mask or the map; of runs only height and width
  int64_t id;
  const int32_t* ends;  // ascending, `count` of them, an even number; pixels are counted column by column
  int32_t count;
  int32_t run_height;  // of the columns. Beyond it, and beyond the last column, is background
};

}  // namespace m2f
