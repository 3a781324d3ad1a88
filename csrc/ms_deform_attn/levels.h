// The feature levels of multi-scale deformable attention as an argument of kernels: plain data, passed by value.
#pragma once

#include <cstdint>

namespace m2f {

constexpr int kMaxLevels = 16;

struct Levels {
  int count;
  int points_total;        // K: the sum of points over levels
  int points[kMaxLevels];  // points of each level, per query and head
  int64_t height[kMaxLevels];
  int64_t width[kMaxLevels];
  int64_t start[kMaxLevels];  // first position in value
};

}  // namespace m2f
