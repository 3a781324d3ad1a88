// Vectors as wide as the instruction set that this file is compiled for. They are the compiler's vector extensions, so
// one source serves AVX-512, AVX2, SSE2 and NEON. Include this header only in files that are compiled once per
// instruction set. Everything is in an unnamed namespace: no two variants may share a symbol.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtype.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace m2f {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};

// T is the arithmetic type: float or double.
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
using Vec = typename VecOf<T, kLanes<T>>::type;
// Integers of T's width: lane masks and pixel indices.
template <typename T>
using Int = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
template <typename T>
using IntVec = typename VecOf<Int<T>, kLanes<T>>::type;

#define M2F_INLINE __attribute__((always_inline)) inline

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // subtracting zero leaves every x as it is; adding zero would change -0
}

template <typename T>
inline Vec<T> select(IntVec<T> mask, Vec<T> a, Vec<T> b) {
  return mask ? a : b;
}

template <typename T>
inline Vec<T> to_float(IntVec<T> x) {
  return __builtin_convertvector(x, Vec<T>);
}

template <typename T>
inline IntVec<T> truncate(Vec<T> x) {
  return __builtin_convertvector(x, IntVec<T>);
}

// a * b + c, rounded once. Without such an instruction (baseline) it is rounded twice; callers do not rely on it.
M2F_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
M2F_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

// ---------------------------------------------------------------- shuffles of two vectors by constant indices
template <typename V, typename I, int... kIndex>
inline V shuffle(V a, V b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, I{kIndex...});
#endif
}

template <int kStart, int kStep, int... kI>
constexpr auto strided_indices(std::integer_sequence<int, kI...>) {
  return std::integer_sequence<int, (kStart + kStep * kI)...>{};
}

// Every second element of the concatenation of a and b, from `kStart`.
template <typename T, int kStart>
inline Vec<T> every_second(Vec<T> a, Vec<T> b) {
  return shuffle<Vec<T>, IntVec<T>>(a, b, strided_indices<kStart, 2>(std::make_integer_sequence<int, kLanes<T>>{}));
}

template <int kLanesTotal, int kHalf, int... kI>
constexpr auto interleaved_indices(std::integer_sequence<int, kI...>) {
  return std::integer_sequence<int, (kHalf * (kLanesTotal / 2) + kI / 2 + (kI % 2) * kLanesTotal)...>{};
}

// a0 b0 a1 b1 ...: the first (kHalf = 0) or second half of it.
template <typename T, int kHalf>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return shuffle<Vec<T>, IntVec<T>>(
      a, b, interleaved_indices<kLanes<T>, kHalf>(std::make_integer_sequence<int, kLanes<T>>{}));
}

// ---------------------------------------------------------------- loads and stores with conversion
using FloatVecUnaligned = typename VecOf<float, kLanes<float>>::unaligned;
using DoubleVecUnaligned = typename VecOf<double, kLanes<double>>::unaligned;

inline Vec<float> load(const float* p) { return *reinterpret_cast<const FloatVecUnaligned*>(p); }
inline Vec<double> load(const double* p) { return *reinterpret_cast<const DoubleVecUnaligned*>(p); }
inline void store(float* p, Vec<float> x) { *reinterpret_cast<FloatVecUnaligned*>(p) = x; }
inline void store(double* p, Vec<double> x) { *reinterpret_cast<DoubleVecUnaligned*>(p) = x; }

using UInt16Vec = typename VecOf<uint16_t, kLanes<float>>::type;
using UInt16VecUnaligned = typename VecOf<uint16_t, kLanes<float>>::unaligned;
using UInt32Vec = typename VecOf<uint32_t, kLanes<float>>::type;
// Pairs of 16-bit elements: aligned like one of them.
typedef uint32_t UInt32VecUnaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

inline UInt32Vec load_bits(const void* p) {
  const UInt16Vec narrow = *reinterpret_cast<const UInt16VecUnaligned*>(p);
  return __builtin_convertvector(narrow, UInt32Vec);
}

inline void store_bits(void* p, UInt32Vec x) {
  *reinterpret_cast<UInt16VecUnaligned*>(p) = __builtin_convertvector(x, UInt16Vec);
}

inline Vec<float> load(const BFloat16* p) { return reinterpret_cast<Vec<float>>(load_bits(p) << 16); }

// Round to nearest even, into the upper half of each lane; NaN stays NaN.
inline UInt32Vec round_to_bfloat16(Vec<float> x) {
  const UInt32Vec bits = reinterpret_cast<UInt32Vec>(x);
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : UInt32Vec{} + 0x7fc00000u;
}

inline void store(BFloat16* p, Vec<float> x) { store_bits(p, round_to_bfloat16(x) >> 16); }

inline Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const UInt32Vec half = load_bits(p);
  const UInt32Vec magnitude = (half & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent from half's bias to float's, subnormals included.
  UInt32Vec bits = reinterpret_cast<UInt32Vec>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? UInt32Vec{} + 0x7f800000u : UInt32Vec{};
  return reinterpret_cast<Vec<float>>(bits | ((half & 0x8000u) << 16));
#endif
}

inline void store(Float16* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const UInt32Vec bits = reinterpret_cast<UInt32Vec>(x);
  const UInt32Vec magnitude = bits & 0x7fffffffu;
  const Vec<float> absolute = reinterpret_cast<Vec<float>>(magnitude);
  const UInt32Vec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 aligns a subnormal half's last bit with float's, and rounds.
  const UInt32Vec subnormal = reinterpret_cast<UInt32Vec>(absolute + 0.5f) - 0x3f000000u;
  UInt32Vec half = absolute < 0x1p-14f ? subnormal : normal;
  half = absolute >= 65520.0f ? UInt32Vec{} + 0x7c00u : half;
  half = x == x ? half : UInt32Vec{} + 0x7e00u;
  store_bits(p, half | ((bits >> 16) & 0x8000u));
#endif
}

// Arithmetic type of an element type.
template <typename V>
using Arithmetic = std::conditional_t<std::is_same_v<V, double>, double, float>;

// Calls f with a zero of the element type. Kernels whose bindings refuse float64 leave it out.
template <bool kWithFloat64 = true, typename F>
M2F_INLINE auto with_type(DType dtype, F&& f) {
  if constexpr (kWithFloat64) {
    if (dtype == DType::kFloat64) return f(double{});
  }
  switch (dtype) {
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    default: return f(float{});
  }
}

// Loads the first `count` elements; the other lanes are zero. It uses a masked load where there is one: otherwise a
// copy of variable size costs a function call, and reading it back as a vector stalls on store forwarding.
template <typename V>
inline Vec<Arithmetic<V>> load_first(const V* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, float>) return _mm512_maskz_loadu_ps((1u << count) - 1, p);
  if constexpr (std::is_same_v<V, double>) return _mm512_maskz_loadu_pd((1u << count) - 1, p);
  if constexpr (std::is_same_v<V, BFloat16>) {
    const __m256i narrow = _mm256_maskz_loadu_epi16((1u << count) - 1, p);
    return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  if constexpr (std::is_same_v<V, Float16>) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
#else
#if defined(__AVX2__)
  if constexpr (std::is_same_v<V, float>) {
    const IntVec<float> lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(lane < count));
  }
#endif
  V padded[kLanes<Arithmetic<V>>] = {};
  std::memcpy(padded, p, count * sizeof(V));
  return load(padded);
#endif
}

template <typename V>
inline void store_first(V* p, int count, Vec<Arithmetic<V>> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, float>) return _mm512_mask_storeu_ps(p, (1u << count) - 1, x);
  if constexpr (std::is_same_v<V, double>) return _mm512_mask_storeu_pd(p, (1u << count) - 1, x);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, float>) {
    const IntVec<float> lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(lane < count), x);
  }
#endif
  V padded[kLanes<Arithmetic<V>>];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(V));
}

// Loads and stores kBlock vectors of consecutive channels. Only these two functions know which lane holds which
// channel: a pair of bfloat16 vectors is split into even and odd channels, which takes one instruction each; widening
// takes two.
template <int kBlock, typename V>
M2F_INLINE void load_block(const V* p, Vec<Arithmetic<V>>* out) {
  constexpr int kStep = kLanes<Arithmetic<V>>;
  if constexpr (std::is_same_v<V, BFloat16> && kBlock % 2 == 0) {
    for (int v = 0; v < kBlock; v += 2) {
      const UInt32Vec pairs = *reinterpret_cast<const UInt32VecUnaligned*>(p + v * kStep);
      out[v] = reinterpret_cast<Vec<float>>(pairs << 16);
      out[v + 1] = reinterpret_cast<Vec<float>>(pairs & 0xffff0000u);
    }
  } else {
    for (int v = 0; v < kBlock; ++v) out[v] = load(p + v * kStep);
  }
}

template <int kBlock, typename V>
M2F_INLINE void store_block(V* p, const Vec<Arithmetic<V>>* x) {
  constexpr int kStep = kLanes<Arithmetic<V>>;
  if constexpr (std::is_same_v<V, BFloat16> && kBlock % 2 == 0) {
    for (int v = 0; v < kBlock; v += 2)
      *reinterpret_cast<UInt32VecUnaligned*>(p + v * kStep) =
          (round_to_bfloat16(x[v]) >> 16) | (round_to_bfloat16(x[v + 1]) & 0xffff0000u);
  } else {
    for (int v = 0; v < kBlock; ++v) store(p + v * kStep, x[v]);
  }
}

// Copies `count` elements of type V to or from the arithmetic type. Memory of `out` and `x` is accessed up to the next
// full vector.
template <typename V>
inline void load_run(const V* p, int64_t count, Arithmetic<V>* out) {
  constexpr int kStep = kLanes<Arithmetic<V>>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store(out + i, load(p + i));
  if (i < count) store(out + i, load_first(p + i, static_cast<int>(count - i)));
}

template <typename V>
inline void store_run(V* p, int64_t count, const Arithmetic<V>* x) {
  constexpr int kStep = kLanes<Arithmetic<V>>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store(p + i, load(x + i));
  if (i < count) store_first(p + i, static_cast<int>(count - i), load(x + i));
}

// The same for an element type that is only known at run time. Source and arithmetic type may differ in width.
template <typename T>
inline void load_run(const void* p, DType dtype, int64_t offset, int64_t count, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    switch (dtype) {
      case DType::kFloat32: return load_run(static_cast<const float*>(p) + offset, count, out);
      case DType::kBFloat16: return load_run(static_cast<const BFloat16*>(p) + offset, count, out);
      case DType::kFloat16: return load_run(static_cast<const Float16*>(p) + offset, count, out);
      case DType::kFloat64:
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<const double*>(p)[offset + i]);
        return;
    }
  } else {
    if (dtype == DType::kFloat64) return load_run(static_cast<const double*>(p) + offset, count, out);
    alignas(64) float narrow[kLanes<float>];
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int64_t step = count - i < kLanes<float> ? count - i : kLanes<float>;
      load_run(p, dtype, offset + i, step, narrow);
      for (int64_t j = 0; j < step; ++j) out[i + j] = narrow[j];
    }
  }
}

template <typename T>
inline void store_run(void* p, DType dtype, int64_t offset, int64_t count, const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    switch (dtype) {
      case DType::kFloat32: return store_run(static_cast<float*>(p) + offset, count, x);
      case DType::kBFloat16: return store_run(static_cast<BFloat16*>(p) + offset, count, x);
      case DType::kFloat16: return store_run(static_cast<Float16*>(p) + offset, count, x);
      case DType::kFloat64:
        for (int64_t i = 0; i < count; ++i) static_cast<double*>(p)[offset + i] = x[i];
        return;
    }
  } else {
    if (dtype == DType::kFloat64) return store_run(static_cast<double*>(p) + offset, count, x);
    alignas(64) float narrow[kLanes<float>];
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int64_t step = count - i < kLanes<float> ? count - i : kLanes<float>;
      for (int64_t j = 0; j < step; ++j) narrow[j] = static_cast<float>(x[i + j]);
      store_run(p, dtype, offset + i, step, narrow);
    }
  }
}

// ---------------------------------------------------------------- reductions
template <int kLanesTotal, int kBy, int... kI>
constexpr auto rotated_indices(std::integer_sequence<int, kI...>) {
  return std::integer_sequence<int, ((kI + kBy) % kLanesTotal)...>{};
}

// Combines all lanes with `op`; every lane of the result holds it.
template <typename T, int kBy = kLanes<T> / 2, typename Op>
M2F_INLINE Vec<T> reduce(Vec<T> x, Op op) {
  constexpr auto kRotated = rotated_indices<kLanes<T>, kBy>(std::make_integer_sequence<int, kLanes<T>>{});
  const Vec<T> combined = op(x, shuffle<Vec<T>, IntVec<T>>(x, x, kRotated));
  if constexpr (kBy == 1) {
    return combined;
  } else {
    return reduce<T, kBy / 2>(combined, op);
  }
}

template <typename T>
M2F_INLINE Vec<T> sum_lanes(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) { return a + b; });
}

template <typename T>
M2F_INLINE Vec<T> max_lanes(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) { return a > b ? a : b; });
}

// table[index] for each lane; the table holds at least one whole vector.
template <typename T>
M2F_INLINE Vec<T> look_up(const T* table, [[maybe_unused]] int64_t table_size, IntVec<T> index) {
#if defined(__AVX512F__)
  if (table_size <= kLanes<T>) {
    if constexpr (std::is_same_v<T, float>)
      return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), load(table));
    else
      return _mm512_permutexvar_pd(reinterpret_cast<__m512i>(index), load(table));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    if (table_size <= kLanes<T>) return _mm256_permutevar8x32_ps(load(table), reinterpret_cast<__m256i>(index));
#endif
  Vec<T> out{};
  for (int i = 0; i < kLanes<T>; ++i) out[i] = table[index[i]];
  return out;
}

template <int kLanesTotal, int kGroup, int kUpper, int... kI>
constexpr auto fold_indices(std::integer_sequence<int, kI...>) {
  // For each group of 2*kGroup lanes: the lower (or upper) half of the group in a, then the same half of the one in b.
  return std::integer_sequence<int, ((kI / (2 * kGroup)) * 2 * kGroup + kUpper * kGroup + kI % kGroup +
                                     ((kI / kGroup) % 2) * kLanesTotal)...>{};
}

// Lane i of the result is the sum of all lanes of rows[i]. A tree merges rows in pairs: first the rows whose indices
// differ in the highest bit, last those that differ in the lowest. So the sums come out in order.
template <typename T, int kGroup = 1>
inline Vec<T> sum_each(const Vec<T>* rows) {
  if constexpr (kGroup == kLanes<T>) {
    return rows[0];
  } else {
    constexpr auto kSequence = std::make_integer_sequence<int, kLanes<T>>{};
    const Vec<T> a = sum_each<T, 2 * kGroup>(rows);
    const Vec<T> b = sum_each<T, 2 * kGroup>(rows + kGroup);
    return shuffle<Vec<T>, IntVec<T>>(a, b, fold_indices<kLanes<T>, kGroup, 0>(kSequence)) +
           shuffle<Vec<T>, IntVec<T>>(a, b, fold_indices<kLanes<T>, kGroup, 1>(kSequence));
  }
}

}  // namespace
}  // namespace m2f
