// Planes of pixels of every type that masks have. Only PixelType may be used outside the files that are compiled once
// per instruction set.
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

// The form of a target: a mask, the pixels of a map that have its id, or the ends of its runs.
enum class TargetKind : int { kMask, kMap8, kMap16, kMap32, kMap64, kRuns };

struct Target {
  TargetKind kind;
  Plane plane;  // the mask or the map; for runs only its height and width are set
  int64_t id;
  const int32_t* ends;  // ascending, `count` of them, an even number; pixels are counted column by column
  int32_t count;
  int32_t run_height;  // height of the columns; pixels below it and after the last column are background
};

}  // namespace m2f
