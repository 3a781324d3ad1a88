// Reading the operators' level arguments: host integers `(h, w, start)` per level, or two int64 tensors.
#pragma once

#include "ms_deform_attn/levels.h"
#include "torch/args.h"

namespace m2f {

// Level sizes from `levels`. If that is empty they come from the tensors, provided that `read_tensors` states that
// these are in host memory. Otherwise only the device knows them, and heights, widths and starts stay zero.
inline Levels read_levels(const std::vector<int64_t>& levels, const std::optional<Tensor>& spatial_shapes,
                          const std::optional<Tensor>& level_start_index, const std::vector<int64_t>& points_per_level,
                          int64_t value_length, bool read_tensors) {
  Levels out{};
  const int64_t count = static_cast<int64_t>(points_per_level.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMaxLevels, "points_per_level: expected 1 to 16 levels, got ", count);
  out.count = static_cast<int>(count);
  int64_t points_total = 0;
  for (int64_t l = 0; l < count; ++l) {
    STD_TORCH_CHECK(points_per_level[l] >= 1 && points_per_level[l] <= INT32_MAX,
                    "points_per_level: expected counts of at least 1 and less than 2^31");
    out.points_per_level[l] = static_cast<int>(points_per_level[l]);
    points_total += points_per_level[l];
  }
  STD_TORCH_CHECK(points_total <= INT32_MAX / 4, "points_per_level: expected fewer than 2^29 points in all");
  out.points_total = static_cast<int>(points_total);
  const int64_t* shapes = nullptr;
  const int64_t* starts = nullptr;
  if (levels.empty()) {
    STD_TORCH_CHECK(spatial_shapes.has_value() && level_start_index.has_value(),
                    "spatial_shapes: expected either levels or both level tensors");
    check_sizes(*spatial_shapes, "spatial_shapes", {count, 2});
    check_sizes(*level_start_index, "level_start_index", {count});
    STD_TORCH_CHECK(spatial_shapes->scalar_type() == ScalarType::Long && spatial_shapes->is_contiguous(),
                    "spatial_shapes: expected a contiguous int64 tensor");
    STD_TORCH_CHECK(level_start_index->scalar_type() == ScalarType::Long && level_start_index->is_contiguous(),
                    "level_start_index: expected a contiguous int64 tensor");
    if (!read_tensors) return out;
    shapes = static_cast<const int64_t*>(spatial_shapes->data_ptr());
    starts = static_cast<const int64_t*>(level_start_index->data_ptr());
  } else {
    STD_TORCH_CHECK(static_cast<int64_t>(levels.size()) == 3 * count, "levels: expected (h, w, start) per level");
  }
  int64_t total = 0;
  for (int64_t l = 0; l < count; ++l) {
    out.height[l] = shapes ? shapes[2 * l] : levels[3 * l];
    out.width[l] = shapes ? shapes[2 * l + 1] : levels[3 * l + 1];
    out.start[l] = starts ? starts[l] : levels[3 * l + 2];
    STD_TORCH_CHECK(out.height[l] >= 1 && out.width[l] >= 1, "spatial_shapes: expected sizes of at least 1, got ",
                    out.height[l], " x ", out.width[l], " for level ", l);
    STD_TORCH_CHECK(out.start[l] >= 0 && out.height[l] <= (value_length - out.start[l]) / out.width[l],
                    "level_start_index: level ", l, " of ", out.height[l], " x ", out.width[l], " starting at ",
                    out.start[l], " does not lie within value's ", value_length, " positions");
    total += out.height[l] * out.width[l];
    // Levels with as many positions as value leave none out if and only if no two of them overlap.
    for (int64_t other = 0; other < l; ++other) {
      const bool apart = out.start[other] + out.height[other] * out.width[other] <= out.start[l] ||
                         out.start[l] + out.height[l] * out.width[l] <= out.start[other];
      STD_TORCH_CHECK(apart, "level_start_index: levels ", other, " and ", l, " overlap");
    }
  }
  STD_TORCH_CHECK(total == value_length, "spatial_shapes: expected levels that sum to value's ", value_length,
                  " positions, got ", total);
  return out;
}

}  // namespace m2f
