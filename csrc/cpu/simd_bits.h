// Lanes of float vectors from and to bits, one bit per lane, and 2^x. For files compiled once per instruction set.
#pragma once

#include "cpu/simd.h"

namespace m2f {
namespace {

using FloatVec = Vec<float>;
constexpr int kFloatLanes = kLanes<float>;

#if !defined(__AVX512F__)
inline IntVec<float> lane_bit() {
#if defined(__AVX2__)
  return IntVec<float>{1, 2, 4, 8, 16, 32, 64, 128};
#else
  return IntVec<float>{1, 2, 4, 8};
#endif
}
#endif

// Lane i is a[i] where bit i is 1, b[i] where it is 0.
M2F_INLINE FloatVec select_bits(uint32_t bits, FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
#else
  const IntVec<float> chosen = (static_cast<int32_t>(bits) & lane_bit()) != 0;
  return chosen ? a : b;
#endif
}

// Bit i is 1 where lane i of the comparison holds.
M2F_INLINE uint32_t bits_of(IntVec<float> comparison) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(comparison)));
#else
  const IntVec<float> bits = comparison & lane_bit();
  return static_cast<uint32_t>(bits[0] | bits[1] | bits[2] | bits[3]);
#endif
}

M2F_INLINE uint32_t greater_bits(FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#else
  return bits_of(a > b);
#endif
}

// Negation of "less", so it holds for NaN as well.
M2F_INLINE uint32_t not_less_bits(FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
#else
  return bits_of(a < b) ^ ((1u << kFloatLanes) - 1);
#endif
}

M2F_INLINE FloatVec maximum(FloatVec a, FloatVec b) { return a > b ? a : b; }

inline float horizontal_sum(FloatVec x) {
  float sum = 0;
  for (int i = 0; i < kFloatLanes; ++i) sum += x[i];
  return sum;
}

inline float horizontal_max(FloatVec x) {
  float max = x[0];
  for (int i = 1; i < kFloatLanes; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

// 2^x with a relative error of 1e-7, for x below 128. NaN gives NaN, -inf gives 0. A subnormal result is 0, except with
// AVX-512, which computes it.
M2F_INLINE FloatVec exp2(FloatVec x) {
#if defined(__AVX512F__)
  const FloatVec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const FloatVec clamped = x < -126.0f ? splat<float>(-126.0f) : x;
  const FloatVec shifted = clamped + 12582912.0f;  // 1.5 * 2^23 leaves the integer nearest to x in the last bits
  const FloatVec nearest = shifted - 12582912.0f;
  const FloatVec floor = nearest > clamped ? nearest - 1.0f : nearest;
  const FloatVec fraction = clamped - floor;
#endif
  // Minimax polynomial on [0, 1], relative error 8e-8.
  FloatVec p = fused(fraction, splat<float>(1.877576680e-3f), splat<float>(8.989340283e-3f));
  p = fused(p, fraction, splat<float>(5.582631767e-2f));
  p = fused(p, fraction, splat<float>(2.401536173e-1f));
  p = fused(p, fraction, splat<float>(6.931530731e-1f));
  p = fused(p, fraction, splat<float>(9.999999251e-1f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
#else
  const IntVec<float> exponent = (truncate<float>(floor) + 127) << 23;
  const FloatVec scaled = p * reinterpret_cast<FloatVec>(exponent);
  return x < -126.0f ? FloatVec{} : scaled;
#endif
}

}  // namespace
}  // namespace m2f
