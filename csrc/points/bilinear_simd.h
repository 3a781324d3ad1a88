// Bilinear samples of one plane of pixels at a vector of points. For files compiled once per instruction set.
//
// A sample reads two pairs of horizontal neighbours. Pixels outside the plane count as zero. They are not read: the
// pair reads the inner pixel twice, and each copy gets half of its weight. That needs no branch, and no pixel is
// multiplied by zero, which would turn an infinite pixel into NaN.
#pragma once

#include "cpu/simd_bits.h"
#include "points/pixels.h"

namespace m2f {
namespace {

struct SamplePoints {
  IntVec<float> index, step, down;  // index of the top left pixel; offsets to its right and lower neighbours, or 0
  FloatVec left, right, top, bottom;
  IntVec<float> inside;  // all ones where the sample contributes; otherwise 0, like the other members
};

struct SampleAxis {
  IntVec<float> base, step;
  FloatVec low, high;
  IntVec<float> inside;
};

// The rounding error of `product` = a * b.
M2F_INLINE FloatVec lost_by_product(FloatVec a, float b, FloatVec product) {
#if defined(__AVX2__) || defined(__AVX512F__)
  return fused(a, splat(b), -product);
#else
  FloatVec lost{};
  for (int i = 0; i < kFloatLanes; ++i)
    lost[i] = static_cast<float>(static_cast<double>(a[i]) * static_cast<double>(b) - static_cast<double>(product[i]));
  return lost;
#endif
}

M2F_INLINE SampleAxis sample_axis(FloatVec coordinate, int64_t size) {
  const float length = static_cast<float>(size);
  const FloatVec scaled = coordinate * length;
  const FloatVec lost = lost_by_product(coordinate, length, scaled);
  const FloatVec x = scaled - 0.5f;
  SampleAxis axis;
  // Comparisons with NaN are false, so a NaN coordinate contributes nothing.
  axis.inside = (x > -1.0f) & (x < length);
  const FloatVec safe = axis.inside ? x : FloatVec{};
  IntVec<float> pixel = truncate<float>(safe);
  pixel += to_float<float>(pixel) > safe;  // floor: a comparison that holds is -1
  const FloatVec fraction = (safe - to_float<float>(pixel)) + (axis.inside ? lost : FloatVec{});
  const IntVec<float> first = pixel < 0, last = pixel == static_cast<int32_t>(size - 1);
  const IntVec<float> edge = first | last;
  const FloatVec half = 0.5f * (first ? fraction : 1.0f - fraction);
  axis.low = edge ? half : 1.0f - fraction;
  axis.high = edge ? half : fraction;
  axis.base = pixel - first;
  axis.step = (edge ? IntVec<float>{} : IntVec<float>{} + 1);
  return axis;
}

M2F_INLINE SamplePoints sample_points(FloatVec x, FloatVec y, int64_t height, int64_t width) {
  const SampleAxis column = sample_axis(x, width), row = sample_axis(y, height);
  const IntVec<float> inside = column.inside & row.inside;
  const int32_t pitch = static_cast<int32_t>(width);
  SamplePoints p;
  p.inside = inside;
  p.index = inside & (row.base * pitch + column.base);
  p.step = inside & column.step;
  p.down = inside & (row.step * pitch);
  p.left = column.low;
  p.right = column.high;
  p.top = inside ? row.low : FloatVec{};
  p.bottom = inside ? row.high : FloatVec{};
  return p;
}

// Splits (x, y) pairs into a vector of x and one of y. If `count` is less than a vector, the other lanes are zero.
M2F_INLINE void load_points(const float* points, int64_t count, FloatVec& x, FloatVec& y) {
  FloatVec a, b;
  if (count >= kFloatLanes) {
    a = load(points);
    b = load(points + kFloatLanes);
  } else {
    alignas(64) float padded[2 * kFloatLanes] = {};
    std::memcpy(padded, points, static_cast<size_t>(count) * 2 * sizeof(float));
    a = load(padded);
    b = load(padded + kFloatLanes);
  }
  x = every_second<float, 0>(a, b);
  y = every_second<float, 1>(a, b);
}

// Calls f with a pointer to the plane's pixels, in their type.
template <typename F>
M2F_INLINE void with_pixels(const Plane& plane, F&& f) {
  switch (plane.type) {
    case PixelType::kFloat64: return f(static_cast<const double*>(plane.data));
    case PixelType::kFloat32: return f(static_cast<const float*>(plane.data));
    case PixelType::kBFloat16: return f(static_cast<const BFloat16*>(plane.data));
    case PixelType::kFloat16: return f(static_cast<const Float16*>(plane.data));
    case PixelType::kByte: return f(static_cast<const uint8_t*>(plane.data));
  }
}

// A map whose pixels are 1 where they hold `id`, else 0.
template <typename E>
struct MapPixels {
  const E* data;
  int64_t id;
};

struct RunPixels {
  const int32_t* ends;
  int32_t count, height;
};

// Calls f with the map's pixels as MapPixels of their type.
template <typename F>
M2F_INLINE void with_map(const Target& target, F&& f) {
  const void* data = target.plane.data;
  switch (target.kind) {
    case TargetKind::kMap8: return f(MapPixels<uint8_t>{static_cast<const uint8_t*>(data), target.id});
    case TargetKind::kMap16: return f(MapPixels<int16_t>{static_cast<const int16_t*>(data), target.id});
    case TargetKind::kMap32: return f(MapPixels<int32_t>{static_cast<const int32_t*>(data), target.id});
    case TargetKind::kMap64: return f(MapPixels<int64_t>{static_cast<const int64_t*>(data), target.id});
    default: return;
  }
}

// Calls f with the source of a target's samples: a pointer to its pixels, MapPixels, or RunPixels.
template <typename F>
M2F_INLINE void with_target(const Target& target, F&& f) {
  if (target.kind == TargetKind::kMask) return with_pixels(target.plane, f);
  if (target.kind == TargetKind::kRuns) return f(RunPixels{target.ends, target.count, target.run_height});
  with_map(target, f);
}

// ---------------------------------------------------------------- two neighbours of each lane
// A byte belongs to a mask: every value but 0 counts as 1, so masks of 0 and 255 equal masks of 0 and 1.
template <typename E>
M2F_INLINE FloatVec gather(const E* p, IntVec<float> index) {
  if constexpr (std::is_same_v<E, float>) {
#if defined(__AVX512F__)
    return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), p, 4);
#elif defined(__AVX2__)
    return _mm256_i32gather_ps(p, reinterpret_cast<__m256i>(index), 4);
#endif
  }
  if constexpr (std::is_same_v<E, BFloat16> || std::is_same_v<E, Float16>) {
    E found[kFloatLanes];
    for (int i = 0; i < kFloatLanes; ++i) found[i] = p[index[i]];
    return load(found);
  } else {
    FloatVec found{};
    for (int i = 0; i < kFloatLanes; ++i) {
      if constexpr (std::is_same_v<E, uint8_t>) {
        found[i] = p[index[i]] != 0 ? 1.0f : 0.0f;
      } else {
        found[i] = static_cast<float>(p[index[i]]);
      }
    }
    return found;
  }
}

#if defined(__AVX512F__)
// The pixel in the low bits of each lane, as float.
template <typename E>
M2F_INLINE FloatVec from_low_bits(UInt32Vec word) {
  if constexpr (std::is_same_v<E, uint8_t>) return (word & 0xffu) != 0 ? FloatVec{} + 1.0f : FloatVec{};
  if constexpr (std::is_same_v<E, BFloat16>) return reinterpret_cast<FloatVec>(word << 16);
  if constexpr (std::is_same_v<E, Float16>)
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(word)));
}
#endif

// Pixels `index` and `index + step` of a plane of `size` pixels. With AVX-512 one load of a wider element brings both,
// which halves the loads. At the end of the plane that load begins further left, so that it stays inside.
template <typename E>
M2F_INLINE void gather_pair(const E* p, int64_t size, IntVec<float> index, IntVec<float> step, FloatVec& a,
                            FloatVec& b) {
#if defined(__AVX512F__)
  constexpr int kTogether = sizeof(E) == 4 ? 2 : static_cast<int>(4 / sizeof(E));
  if constexpr (sizeof(E) <= 4) {
    if (__builtin_expect(size >= kTogether, 1)) {
      const IntVec<float> limit = IntVec<float>{} + static_cast<int32_t>(size - kTogether);
      const IntVec<float> base = index < limit ? index : limit;
      const IntVec<float> behind = index - base;
      if constexpr (std::is_same_v<E, float>) {
        const __m512i at = reinterpret_cast<__m512i>(base);
        const __m512d low = _mm512_i32gather_pd(_mm512_castsi512_si256(at), p, 4);
        const __m512d high = _mm512_i32gather_pd(_mm512_extracti64x4_epi64(at, 1), p, 4);
        const FloatVec even = every_second<float, 0>(reinterpret_cast<FloatVec>(low), reinterpret_cast<FloatVec>(high));
        const FloatVec odd = every_second<float, 1>(reinterpret_cast<FloatVec>(low), reinterpret_cast<FloatVec>(high));
        a = behind != 0 ? odd : even;
        b = (behind | step) != 0 ? odd : even;
      } else {
        constexpr int kBits = 8 * sizeof(E);
        const UInt32Vec word = reinterpret_cast<UInt32Vec>(
            _mm512_i32gather_epi32(reinterpret_cast<__m512i>(base), p, static_cast<int>(sizeof(E))));
        const UInt32Vec shift = reinterpret_cast<UInt32Vec>(behind) * static_cast<uint32_t>(kBits);
        const UInt32Vec first = word >> shift;
        const UInt32Vec second = first >> (reinterpret_cast<UInt32Vec>(step) * static_cast<uint32_t>(kBits));
        a = from_low_bits<E>(first);
        b = from_low_bits<E>(second);
      }
      return;
    }
  }
#else
  static_cast<void>(size);
#endif
  a = gather(p, index);
  b = gather(p, index + step);
}

// ---------------------------------------------------------------- maps of ids
typedef typename VecOf<int64_t, kFloatLanes>::type LongVec;

// The integer type in which ids of a map are compared.
template <typename E>
using IdVec = std::conditional_t<sizeof(E) == 8, LongVec, IntVec<float>>;

M2F_INLINE IntVec<float> gather_integers(const int32_t* p, IntVec<float> index) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec<float>>(_mm512_i32gather_epi32(reinterpret_cast<__m512i>(index), p, 4));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVec<float>>(_mm256_i32gather_epi32(p, reinterpret_cast<__m256i>(index), 4));
#else
  IntVec<float> found{};
  for (int i = 0; i < kFloatLanes; ++i) found[i] = p[index[i]];
  return found;
#endif
}

// Like gather_pair, for the ids of pixels `index` and `index + step`.
template <typename E>
M2F_INLINE void gather_id_pair(const E* p, int64_t size, IntVec<float> index, IntVec<float> step, IdVec<E>& a,
                               IdVec<E>& b) {
#if defined(__AVX512F__)
  constexpr int kTogether = static_cast<int>(4 / sizeof(E));
  if constexpr (sizeof(E) <= 2) {
    if (__builtin_expect(size >= kTogether, 1)) {
      constexpr int kBits = 8 * sizeof(E);
      const IntVec<float> limit = IntVec<float>{} + static_cast<int32_t>(size - kTogether);
      const IntVec<float> base = index < limit ? index : limit;
      const UInt32Vec word = reinterpret_cast<UInt32Vec>(
          _mm512_i32gather_epi32(reinterpret_cast<__m512i>(base), p, static_cast<int>(sizeof(E))));
      const UInt32Vec first = word >> (reinterpret_cast<UInt32Vec>(index - base) * static_cast<uint32_t>(kBits));
      const UInt32Vec second = first >> (reinterpret_cast<UInt32Vec>(step) * static_cast<uint32_t>(kBits));
      if constexpr (std::is_same_v<E, uint8_t>) {
        a = reinterpret_cast<IntVec<float>>(first & 0xffu);
        b = reinterpret_cast<IntVec<float>>(second & 0xffu);
      } else {
        a = reinterpret_cast<IntVec<float>>(first << 16) >> 16;
        b = reinterpret_cast<IntVec<float>>(second << 16) >> 16;
      }
      return;
    }
  }
#else
  static_cast<void>(size);
#endif
  if constexpr (std::is_same_v<E, int32_t>) {
    a = gather_integers(p, index);
    b = gather_integers(p, index + step);
  } else {
    for (int i = 0; i < kFloatLanes; ++i) {
      a[i] = p[index[i]];
      b[i] = p[index[i] + step[i]];
    }
  }
}

M2F_INLINE FloatVec one_where(IntVec<float> found, int64_t id) {
  const int32_t narrow = static_cast<int32_t>(id);
  return found == narrow ? splat(narrow == id ? 1.0f : 0.0f) : FloatVec{};
}

M2F_INLINE FloatVec one_where(LongVec found, int64_t id) {
  return __builtin_convertvector(found == id, IntVec<float>) != 0 ? splat(1.0f) : FloatVec{};
}

template <typename E>
M2F_INLINE void gather_pair(MapPixels<E> map, int64_t size, IntVec<float> index, IntVec<float> step, FloatVec& a,
                            FloatVec& b) {
  IdVec<E> first, second;
  gather_id_pair(map.data, size, index, step, first, second);
  a = one_where(first, map.id);
  b = one_where(second, map.id);
}

// The sample of the four pixels of each point: top left, top right, bottom left, bottom right.
M2F_INLINE FloatVec weigh_corners(const SamplePoints& p, FloatVec a, FloatVec b, FloatVec c, FloatVec d) {
  const FloatVec upper = fused(a, p.left, b * p.right), lower = fused(c, p.left, d * p.right);
  const FloatVec value = fused(upper, p.top, lower * p.bottom);
  return p.inside ? value : FloatVec{};
}

// `Pixels` points to pixels, or is MapPixels.
template <typename Pixels>
M2F_INLINE FloatVec sample_plane(Pixels plane, int64_t size, const SamplePoints& p) {
  FloatVec a, b, c, d;
  gather_pair(plane, size, p.index, p.step, a, b);
  gather_pair(plane, size, p.index + p.down, p.step, c, d);
  return weigh_corners(p, a, b, c, d);
}

// ---------------------------------------------------------------- run lengths
// The number of ends of runs at or before each pixel.
M2F_INLINE IntVec<float> ends_before(const RunPixels& runs, IntVec<float> pixel) {
  IntVec<float> found{};
  int32_t step = 1;
  while (2 * static_cast<int64_t>(step) <= runs.count) step *= 2;
  for (; step > 0; step /= 2) {
    const IntVec<float> probe = found + step;
    const IntVec<float> exists = probe <= runs.count;
    const IntVec<float> end = gather_integers(runs.ends, (exists ? probe : IntVec<float>{} + 1) - 1);
    found = exists & (end <= pixel) ? probe : found;
  }
  return found;
}

M2F_INLINE FloatVec one_where_odd(IntVec<float> number) { return to_float<float>(number & 1); }

// Samples of runs of a target of `height` x `width` pixels.
M2F_INLINE FloatVec sample_runs(const RunPixels& runs, FloatVec x, FloatVec y, int64_t height, int64_t width) {
  const SampleAxis column = sample_axis(x, width), row = sample_axis(y, height);
  const IntVec<float> below = row.base + row.step;
  // Pixels are counted down each column. Beyond the last pixel all ends lie before, an even number: background.
  const IntVec<float> has_row = row.base < runs.height, has_below = below < runs.height;
  FloatVec corner[2][2];
  for (int side = 0; side < 2; ++side) {
    const IntVec<float> first = (side ? column.base + column.step : column.base) * runs.height;
    const IntVec<float> pixel = first + row.base;
    const IntVec<float> before = ends_before(runs, pixel);
    // The pixel below follows directly, so at most one more end lies at or before it.
    const IntVec<float> more = before < runs.count;
    const IntVec<float> next = gather_integers(runs.ends, more & before);
    const IntVec<float> before_below = before - (more & (next <= first + below));
    corner[0][side] = one_where_odd(has_row & before);
    corner[1][side] = one_where_odd(has_below & before_below);
  }
  SamplePoints p{};
  p.inside = column.inside & row.inside;
  p.left = column.low;
  p.right = column.high;
  p.top = p.inside ? row.low : FloatVec{};
  p.bottom = p.inside ? row.high : FloatVec{};
  return weigh_corners(p, corner[0][0], corner[0][1], corner[1][0], corner[1][1]);
}

// Adds `gradient` of each sample to the plane. It goes lane by lane, since two lanes may share a pixel.
M2F_INLINE void scatter_plane(float* plane, const SamplePoints& p, FloatVec gradient, int count) {
  const FloatVec g = p.inside ? gradient : FloatVec{};
  const FloatVec upper = g * p.top, lower = g * p.bottom;
  alignas(64) float weight[4][kFloatLanes];
  alignas(64) int32_t index[kFloatLanes], step[kFloatLanes], down[kFloatLanes];
  store(weight[0], upper * p.left);
  store(weight[1], upper * p.right);
  store(weight[2], lower * p.left);
  store(weight[3], lower * p.right);
  std::memcpy(index, &p.index, sizeof(index));
  std::memcpy(step, &p.step, sizeof(step));
  std::memcpy(down, &p.down, sizeof(down));
  for (int i = 0; i < count; ++i) {
    float* top = plane + index[i];
    float* bottom = top + down[i];
    top[0] += weight[0][i];
    top[step[i]] += weight[1][i];
    bottom[0] += weight[2][i];
    bottom[step[i]] += weight[3][i];
  }
}

}  // namespace
}  // namespace m2f
