// Bilinear samples of one plane of pixels at a vector of points. For files compiled once per instruction set.
//
// A sample reads two pairs of horizontal neighbours. A neighbour outside the plane is zero; instead of reading it, the
// pair reads the inner pixel twice, each with half of its weight: no branch, and no product of zero and an infinite
// pixel that the sample has nothing to do with.
#pragma once

#include "common/pixels.h"
#include "common/simd_bits.h"

namespace m2f {
namespace {

struct SamplePoints {
  IntVec<float> index, step, down;  // of the top left pixel; to its right neighbour and to the one below, or 0
  FloatVec left, right, top, bottom;
  IntVec<float> inside;  // all ones, or zero where the sample contributes nothing (all else is then 0)
};

struct SampleAxis {
  IntVec<float> base, step;
  FloatVec low, high;
  IntVec<float> inside;
};

// What rounding took from the product of a and b.
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

// (x, y) pairs to one vector each; of the last `count` points where fewer than a vector are left, zero beyond.
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

// Calls f with a pointer of the plane's own type.
template <typename F>
M2F_INLINE void with_pixels(const Plane& plane, F&& f) {
  switch (plane.type) {
    case PixelType::kFloat64: return f(static_cast<const double*>(plane.data));
    case PixelType::kFloat32: return f(static_cast<const float*>(plane.data));
    case PixelType::kBFloat16: return f(static_cast<const BFloat16*>(plane.data));
    case PixelType::kFloat16: return f(static_cast<const Float16*>(plane.data));
    case PixelType::kByte: return f(static_cast<const uint8_t*>(plane.data));
    case PixelType::kIndex: return;  // see with_targets
  }
}

// The same where the plane may be one of indices.
template <typename F>
M2F_INLINE void with_targets(const Plane& plane, F&& f) {
  if (plane.type == PixelType::kIndex)
    f(IndexPixels{static_cast<const int32_t*>(plane.data), plane.number});
  else
    with_pixels(plane, f);
}

// ---------------------------------------------------------------- two neighbours of each lane
// A byte is a mask's: 1 for any value but 0, so that masks of 0 and 255 are those of 0 and 1.
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
// A pixel from the low bits of each lane.
template <typename E>
M2F_INLINE FloatVec from_low_bits(UInt32Vec word) {
  if constexpr (std::is_same_v<E, uint8_t>) return (word & 0xffu) != 0 ? FloatVec{} + 1.0f : FloatVec{};
  if constexpr (std::is_same_v<E, BFloat16>) return reinterpret_cast<FloatVec>(word << 16);
  if constexpr (std::is_same_v<E, Float16>)
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(word)));
}
#endif

// Pixels `index` and `index + step` of a plane of `size` pixels. With AVX-512 both come from one wide element where
// the plane has room for it, which halves the loads; the last pixels are read from further left.
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

M2F_INLINE IntVec<float> gather_numbers(const int32_t* data, IntVec<float> index) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec<float>>(_mm512_i32gather_epi32(reinterpret_cast<__m512i>(index), data, 4));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVec<float>>(_mm256_i32gather_epi32(data, reinterpret_cast<__m256i>(index), 4));
#else
  IntVec<float> found{};
  for (int i = 0; i < kFloatLanes; ++i) found[i] = data[index[i]];
  return found;
#endif
}

M2F_INLINE FloatVec one_where(IntVec<float> found, int32_t number) {
  return found == number ? splat(1.0f) : FloatVec{};
}

M2F_INLINE FloatVec gather(IndexPixels pixels, IntVec<float> index) {
  return one_where(gather_numbers(pixels.data, index), pixels.number);
}

M2F_INLINE void gather_pair(IndexPixels pixels, int64_t, IntVec<float> index, IntVec<float> step, FloatVec& a,
                            FloatVec& b) {
  a = gather(pixels, index);
  b = gather(pixels, index + step);
}

// The sample of the four pixels of each point: top left, top right, bottom left, bottom right.
M2F_INLINE FloatVec weigh_corners(const SamplePoints& p, FloatVec a, FloatVec b, FloatVec c, FloatVec d) {
  const FloatVec upper = fused(a, p.left, b * p.right), lower = fused(c, p.left, d * p.right);
  const FloatVec value = fused(upper, p.top, lower * p.bottom);
  return p.inside ? value : FloatVec{};
}

// `Pixels` points to pixels, or is IndexPixels.
template <typename Pixels>
M2F_INLINE FloatVec sample_plane(Pixels plane, int64_t size, const SamplePoints& p) {
  FloatVec a, b, c, d;
  gather_pair(plane, size, p.index, p.step, a, b);
  gather_pair(plane, size, p.index + p.down, p.step, c, d);
  return weigh_corners(p, a, b, c, d);
}

// Adds `gradient` of each sample into the plane, lane after lane: two lanes may share a pixel.
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
