// Geometry of the CPU kernels: the packed panel of one head's value, and the preparation of one query's samples.
// Included by cpu_kernel.cpp only, so that each instruction set has its own copy.
#pragma once

#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "ms_deform_attn/cpu_kernel.h"

namespace m2f {
namespace {

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------- the panel
// Level l has rows -2 .. h of width + 1 pixels. Column -1 is zero, and is column w of the row above as well. Rows -2
// and -1 are zero, so that a 2 x 2 block of zeros begins at the level's first pixel.
struct PanelLevel {
  int64_t first;  // pixel index of (row -2, column -1)
  int64_t row;    // pixels from one row to the next
};

struct Panel {
  PanelLevel level[kMaxLevels];
  int64_t pixels;
  int64_t d;  // channels per pixel, padded to whole vectors
};

template <typename T>
Panel make_panel(const MSDeformAttnArgs& args) {
  Panel panel;
  panel.pixels = 0;
  panel.d = round_up(args.channels, kLanes<T>);
  for (int l = 0; l < args.levels.count; ++l) {
    panel.level[l] = {panel.pixels, args.levels.width[l] + 1};
    panel.pixels += (args.levels.height[l] + 3) * panel.level[l].row + 1;
  }
  return panel;
}

template <typename V>
void pack_value(const MSDeformAttnArgs& args, const Panel& panel, int64_t n, int64_t h, V* out) {
  const V* value = static_cast<const V*>(args.value.data);
  const int64_t row_elements = args.channels;
  const bool padded = panel.d != args.channels;
  for (int l = 0; l < args.levels.count; ++l) {
    const int64_t height = args.levels.height[l], width = args.levels.width[l];
    V* p = out + panel.level[l].first * panel.d;
    std::memset(p, 0, (2 * panel.level[l].row + 1) * panel.d * sizeof(V));
    p += 2 * panel.level[l].row * panel.d;
    const V* source = value + args.value.offset(n, args.levels.start[l], h);
    for (int64_t y = 0; y < height; ++y) {
      std::memset(p, 0, panel.d * sizeof(V));
      p += panel.d;
      for (int64_t x = 0; x < width; ++x, p += panel.d, source += args.value.stride[1]) {
        if (padded) {
          std::memset(p, 0, panel.d * sizeof(V));
          std::memcpy(p, source, row_elements * sizeof(V));
        } else {
          for (int64_t c = 0; c < row_elements; c += kLanes<Arithmetic<V>>)
            std::memcpy(p + c, source + c, kLanes<Arithmetic<V>> * sizeof(V));
        }
      }
    }
    std::memset(p, 0, (panel.level[l].row + 1) * panel.d * sizeof(V));
  }
}

// ---------------------------------------------------------------- preparing the samples of one query and head
// Structure of arrays over the K samples, padded to whole vectors; padding lanes never contribute.
template <typename T>
struct Samples {
  int64_t k, padded;
  // Constant over the call.
  T *width, *height;   // level size
  Int<T>*first, *row;  // panel: index of the level's frame, pixels per row
  T* inverse_count;    // 1 / points of the level
  int* level;
  // Of the current query.
  T *raw_xy, *raw_weight;  // as loaded
  T* point;                // the query's reference points, reference_dim values per level
  Int<T>* point_index;     // where a sample's level starts in it
  T* reference;            // the same spread over samples, by component: [4][padded]
  T* probability;          // attention weight before masking (from_offsets: after the softmax)
  T* weight;               // attention weight, zero where the sample does not contribute
  T *fx, *fy;
  Int<T>* contributes;  // all ones or zero
  Int<T>*x0, *y0;
  Int<T>* pixel;  // panel index of the top left corner
  T* corner[4];   // weight * bilinear weight, of corners (y0,x0) (y0,x1) (y1,x0) (y1,x1)
  // Backward.
  T *grad_x, *grad_y, *grad_weight;
  Vec<T>* partial;  // [4][padded] dot products not yet reduced over lanes
};

template <typename T>
Samples<T> take_samples(const MSDeformAttnArgs& args, Pieces& memory, bool backward) {
  Samples<T> s{};
  s.k = args.levels.points_total;
  s.padded = round_up(s.k, kLanes<T>);
  s.width = memory.take<T>(s.padded);
  s.height = memory.take<T>(s.padded);
  s.first = memory.take<Int<T>>(s.padded);
  s.row = memory.take<Int<T>>(s.padded);
  s.inverse_count = memory.take<T>(s.padded);
  s.level = memory.take<int>(s.padded);
  s.raw_xy = memory.take<T>(2 * s.padded);
  s.raw_weight = memory.take<T>(s.padded);
  s.point = memory.take<T>(4 * kMaxLevels);
  s.point_index = memory.take<Int<T>>(s.padded);
  s.reference = memory.take<T>(4 * s.padded);
  s.probability = memory.take<T>(s.padded);
  s.weight = memory.take<T>(s.padded);
  s.fx = memory.take<T>(s.padded);
  s.fy = memory.take<T>(s.padded);
  s.contributes = memory.take<Int<T>>(s.padded);
  s.x0 = memory.take<Int<T>>(s.padded);
  s.y0 = memory.take<Int<T>>(s.padded);
  s.pixel = memory.take<Int<T>>(s.padded);
  for (T*& corner : s.corner) corner = memory.take<T>(s.padded);
  if (backward) {
    s.grad_x = memory.take<T>(s.padded);
    s.grad_y = memory.take<T>(s.padded);
    s.grad_weight = memory.take<T>(s.padded);
    s.partial = memory.take<Vec<T>>(4 * s.padded);
  }
  return s;
}

template <typename T>
void set_constants(const MSDeformAttnArgs& args, const Panel& panel, Samples<T>& s) {
  std::memset(s.raw_xy, 0, 2 * s.padded * sizeof(T));
  std::memset(s.raw_weight, 0, s.padded * sizeof(T));
  std::memset(s.reference, 0, 4 * s.padded * sizeof(T));
  int64_t k = 0;
  for (int l = 0; l < args.levels.count; ++l) {
    for (int p = 0; p < args.levels.points_per_level[l]; ++p, ++k) {
      s.width[k] = static_cast<T>(args.levels.width[l]);
      s.height[k] = static_cast<T>(args.levels.height[l]);
      s.first[k] = static_cast<Int<T>>(panel.level[l].first);
      s.row[k] = static_cast<Int<T>>(panel.level[l].row);
      s.inverse_count[k] = T(1) / static_cast<T>(args.levels.points_per_level[l]);
      s.level[k] = l;
      s.point_index[k] = l * args.reference_dim;
    }
  }
  for (; k < s.padded; ++k) {
    // With size -1 no coordinate lies in (-1, size), so these lanes never contribute.
    s.width[k] = s.height[k] = T(-1);
    s.first[k] = s.row[k] = 0;
    s.inverse_count[k] = 0;
    s.level[k] = 0;
    s.point_index[k] = 0;
  }
}

template <typename T>
inline IntVec<T> load_int(const Int<T>* p) {
  return *reinterpret_cast<const IntVec<T>*>(p);
}

template <typename T>
inline void store_int(Int<T>* p, IntVec<T> x) {
  *reinterpret_cast<IntVec<T>*>(p) = x;
}

// e^x for x <= 0 to about 1 ulp: 2^n * e^r with |r| <= ln(2)/2, Taylor of degree 7; NaN stays NaN.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const IntVec<float> tiny = x < -87.0f;
  const Vec<float> safe = tiny ? Vec<float>{} : x;
  const IntVec<float> n = truncate<float>(safe * 1.44269504088896341f - 0.5f);
  const Vec<float> nf = to_float<float>(n);
  const Vec<float> r = (safe - nf * 0.693359375f) + nf * 2.12194440e-4f;
  Vec<float> y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Vec<float> scale = reinterpret_cast<Vec<float>>((n + 127) << 23);
  return tiny ? Vec<float>{} : y * scale;
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Writes the attention weights of the query to s.probability; for from_offsets their softmax.
template <typename T>
inline void load_weights(const MSDeformAttnArgs& args, int64_t n, int64_t q, int64_t h, Samples<T>& s) {
  T* weights = args.from_offsets ? s.raw_weight : s.probability;
  load_run(args.weights.data, args.weights.dtype, args.weights.offset(n, q, h), s.k, weights);
  if (!args.from_offsets) return;
  const T lowest = -__builtin_inf();
  for (int64_t k = s.k; k < s.padded; ++k) weights[k] = lowest;
  Vec<T> largest = load(weights);
  for (int64_t k = kLanes<T>; k < s.padded; k += kLanes<T>) {
    const Vec<T> x = load(weights + k);
    largest = x > largest ? x : largest;
  }
  largest = max_lanes<T>(largest);
  Vec<T> sum{};
  for (int64_t k = 0; k < s.padded; k += kLanes<T>) {
    const Vec<T> e = exp_nonpositive(load(weights + k) - largest);
    store(s.probability + k, e);
    sum += e;
  }
  const Vec<T> inverse = T(1) / sum_lanes<T>(sum);
  for (int64_t k = 0; k < s.padded; k += kLanes<T>) store(s.probability + k, load(s.probability + k) * inverse);
}

template <typename T>
inline void load_reference(const MSDeformAttnArgs& args, int64_t n, int64_t q, Samples<T>& s) {
  const Rows& rows = args.reference;
  const int64_t size = args.levels.count * args.reference_dim;
  if (rows.stride[2] == args.reference_dim) {
    load_run(rows.data, rows.dtype, rows.offset(n, q, 0), size, s.point);
  } else {
    alignas(64) T level[kLanes<T> < 4 ? 4 : kLanes<T>];
    for (int l = 0; l < args.levels.count; ++l) {
      load_run(rows.data, rows.dtype, rows.offset(n, q, l), args.reference_dim, level);
      for (int c = 0; c < args.reference_dim; ++c) s.point[l * args.reference_dim + c] = level[c];
    }
  }
  for (int64_t k = 0; k < s.padded; k += kLanes<T>)
    for (int c = 0; c < args.reference_dim; ++c)
      store(s.reference + c * s.padded + k, look_up(s.point, size, load_int<T>(s.point_index + k) + c));
}

// Computes all that the gather needs, for all K samples at once.
template <typename T>
inline void prepare(const MSDeformAttnArgs& args, int64_t n, int64_t q, int64_t h, Samples<T>& s) {
  load_run(args.locations.data, args.locations.dtype, args.locations.offset(n, q, h), 2 * s.k, s.raw_xy);
  load_weights(args, n, q, h, s);
  const T scale = static_cast<T>(args.offset_scale);
  for (int64_t k = 0; k < s.padded; k += kLanes<T>) {
    const Vec<T> a = load(s.raw_xy + 2 * k), b = load(s.raw_xy + 2 * k + kLanes<T>);
    const Vec<T> raw_x = every_second<T, 0>(a, b), raw_y = every_second<T, 1>(a, b);
    const Vec<T> width = load(s.width + k), height = load(s.height + k);
    // Pixel = anchor * size + shift.
    Vec<T> anchor_x = raw_x, anchor_y = raw_y, shift_x = splat(T(-0.5)), shift_y = splat(T(-0.5));
    if (args.from_offsets) {
      anchor_x = load(s.reference + k);
      anchor_y = load(s.reference + s.padded + k);
      Vec<T> unit_x = splat(T(1)), unit_y = splat(T(1));
      if (args.reference_dim == 4) {
        const Vec<T> unit = load(s.inverse_count + k) * scale;
        unit_x = unit * load(s.reference + 2 * s.padded + k) * width;
        unit_y = unit * load(s.reference + 3 * s.padded + k) * height;
      }
      shift_x += raw_x * unit_x;
      shift_y += raw_y * unit_y;
    }
    // The product with the level's size has a relative error of 1e-7. The fractions need it, so it is added to them.
    const Vec<T> product_x = anchor_x * width, product_y = anchor_y * height;
    const Vec<T> rest_x = fused(anchor_x, width, -product_x), rest_y = fused(anchor_y, height, -product_y);
    Vec<T> x = product_x + shift_x, y = product_y + shift_y;
    // False for NaN.
    const IntVec<T> inside = (x > T(-1)) & (x < width) & (y > T(-1)) & (y < height);
    x = select<T>(inside, x, Vec<T>{});
    y = select<T>(inside, y, Vec<T>{});
    IntVec<T> x0 = truncate<T>(x), y0 = truncate<T>(y);
    x0 += to_float<T>(x0) > x;  // a true comparison is -1: truncation becomes floor
    y0 += to_float<T>(y0) > y;
    const Vec<T> fx = select<T>(inside, ((product_x - to_float<T>(x0)) + shift_x) + rest_x, Vec<T>{});
    const Vec<T> fy = select<T>(inside, ((product_y - to_float<T>(y0)) + shift_y) + rest_y, Vec<T>{});
    const Vec<T> weight = select<T>(inside, load(s.probability + k), Vec<T>{});
    const IntVec<T> pixel = load_int<T>(s.first + k) + (((y0 + 2) * load_int<T>(s.row + k) + x0 + 1) & inside);
    const Vec<T> upper = weight * (T(1) - fy), lower = weight * fy;
    store(s.corner[0] + k, upper * (T(1) - fx));
    store(s.corner[1] + k, upper * fx);
    store(s.corner[2] + k, lower * (T(1) - fx));
    store(s.corner[3] + k, lower * fx);
    store(s.weight + k, weight);
    store(s.fx + k, fx);
    store(s.fy + k, fy);
    store_int<T>(s.contributes + k, inside);
    store_int<T>(s.x0 + k, x0);
    store_int<T>(s.y0 + k, y0);
    store_int<T>(s.pixel + k, pixel);
  }
}

}  // namespace
}  // namespace m2f
