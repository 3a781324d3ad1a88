// The feature levels of multi-scale deformable attention as an argument of kernels: plain data, passed by value.
#pragma once

#include <cstdint>

namespace m2f {

constexpr int kMaxLevels = 16;

struct Levels {
  int count;
  int points_total;                  // K: the sum of points over levels
  int points_per_level[kMaxLevels];  // of each query and head
  int64_t height[kMaxLevels];
  int64_t width[kMaxLevels];
  int64_t start[kMaxLevels];  // first position in value
};

}  // namespace m2f
