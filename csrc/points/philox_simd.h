// Philox4x32-10 (Salmon et al., 2011), a vector of counters at a time. For files compiled once per instruction set.
#pragma once

#include "cpu/simd_bits.h"

namespace m2f {
namespace {

// The two halves of the product of each lane with m.
M2F_INLINE void multiply_wide(UInt32Vec x, uint32_t m, UInt32Vec& high, UInt32Vec& low) {
#if defined(__AVX512F__)
  const __m512i a = reinterpret_cast<__m512i>(x), factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  high = reinterpret_cast<UInt32Vec>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  low = reinterpret_cast<UInt32Vec>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i a = reinterpret_cast<__m256i>(x), factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  high = reinterpret_cast<UInt32Vec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = reinterpret_cast<UInt32Vec>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < kFloatLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(x[i]) * m;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Four words for each counter (first + lane, stream, 0, 0).
M2F_INLINE void philox(uint32_t first, uint32_t stream, uint64_t seed, UInt32Vec word[4]) {
  UInt32Vec c[4] = {};
  for (int i = 0; i < kFloatLanes; ++i) c[0][i] = first + static_cast<uint32_t>(i);
  c[1] += stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    UInt32Vec high0{}, low0{}, high2{}, low2{};
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high2, low2);
    c[0] = high2 ^ c[1] ^ k0;
    c[1] = low2;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 4; ++i) word[i] = c[i];
}

// The upper 24 bits of each lane as a float in [0, 1).
M2F_INLINE FloatVec unit_interval(UInt32Vec word) {
  return to_float<float>(reinterpret_cast<IntVec<float>>(word >> 8)) * 0x1p-24f;
}

// Uniform points 2 * first ... of a stream: 2 * kFloatLanes of them, in order.
M2F_INLINE void uniform_points(uint32_t first, uint32_t stream, uint64_t seed, FloatVec x[2], FloatVec y[2]) {
  UInt32Vec word[4];
  philox(first, stream, seed, word);
  const FloatVec x0 = unit_interval(word[0]), y0 = unit_interval(word[1]);
  const FloatVec x1 = unit_interval(word[2]), y1 = unit_interval(word[3]);
  x[0] = interleave<float, 0>(x0, x1);
  x[1] = interleave<float, 1>(x0, x1);
  y[0] = interleave<float, 0>(y0, y1);
  y[1] = interleave<float, 1>(y0, y1);
}

}  // namespace
}  // namespace m2f
