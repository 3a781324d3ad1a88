// Loads, stores, conversions and atomic additions of channel vectors, and scalars whose dtype is known at run time
// only.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "ms_deform_attn/launch.cuh"

namespace m2f {

// Arithmetic is fp32, and fp64 where value is.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ double to_accumulator(double x) { return x; }
__device__ __forceinline__ float to_accumulator(float x) { return x; }
__device__ __forceinline__ float to_accumulator(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_accumulator(__half x) { return __half2float(x); }

__device__ __forceinline__ double load_element(const double* p) { return __ldg(p); }
__device__ __forceinline__ float load_element(const float* p) { return __ldg(p); }
__device__ __forceinline__ __nv_bfloat16 load_element(const __nv_bfloat16* p) {
  return __ushort_as_bfloat16(__ldg(reinterpret_cast<const unsigned short*>(p)));
}
__device__ __forceinline__ __half load_element(const __half* p) {
  return __ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p)));
}

// No kernel reads its own results again, so stores need not stay in the cache.
__device__ __forceinline__ void store_element(double* p, double x) { __stcs(p, x); }
__device__ __forceinline__ void store_element(float* p, float x) { __stcs(p, x); }
__device__ __forceinline__ void store_element(__nv_bfloat16* p, float x) {
  __stcs(reinterpret_cast<unsigned short*>(p), __bfloat16_as_ushort(__float2bfloat16_rn(x)));
}
__device__ __forceinline__ void store_element(__half* p, float x) {
  __stcs(reinterpret_cast<unsigned short*>(p), __half_as_ushort(__float2half_rn(x)));
}

// kCount elements of T that are loaded or stored in one access: one element, or 16 bytes in the specialisations.
template <typename T, int kCount>
struct Vector {
  static_assert(kCount == 1, "either one element or 16 bytes");
  using A = Accumulator<T>;
  using Raw = T;
  static __device__ __forceinline__ Raw zero() { return T(0.0f); }
  static __device__ __forceinline__ Raw load(const void* p) { return load_element(static_cast<const T*>(p)); }
  static __device__ __forceinline__ void unpack(Raw raw, A (&out)[1]) { out[0] = to_accumulator(raw); }
  static __device__ __forceinline__ void store(T* p, const A (&x)[1]) { store_element(p, x[0]); }
};

struct Raw16 {
  static __device__ __forceinline__ uint4 zero() { return make_uint4(0, 0, 0, 0); }
  static __device__ __forceinline__ uint4 load(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
};

template <>
struct Vector<float, 4> : Raw16 {
  using A = float;
  using Raw = uint4;
  static __device__ __forceinline__ void unpack(uint4 raw, float (&out)[4]) {
    out[0] = __uint_as_float(raw.x);
    out[1] = __uint_as_float(raw.y);
    out[2] = __uint_as_float(raw.z);
    out[3] = __uint_as_float(raw.w);
  }
  static __device__ __forceinline__ void store(float* p, const float (&x)[4]) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));
  }
};

// Two 16-bit elements in a word, the first in its low half.
template <typename T>
struct Pair16;

template <>
struct Pair16<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(unsigned int word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned int pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&pair);
  }
};

template <>
struct Pair16<__half> {
  static __device__ __forceinline__ void unpack(unsigned int word, float& low, float& high) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = pair.x;
    high = pair.y;
  }
  static __device__ __forceinline__ unsigned int pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&pair);
  }
};

template <typename T>
struct Vector<T, 8> : Raw16 {
  using A = float;
  using Raw = uint4;
  static __device__ __forceinline__ void unpack(uint4 raw, float (&out)[8]) {
    Pair16<T>::unpack(raw.x, out[0], out[1]);
    Pair16<T>::unpack(raw.y, out[2], out[3]);
    Pair16<T>::unpack(raw.z, out[4], out[5]);
    Pair16<T>::unpack(raw.w, out[6], out[7]);
  }
  static __device__ __forceinline__ void store(T* p, const float (&x)[8]) {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(Pair16<T>::pack(x[0], x[1]), Pair16<T>::pack(x[2], x[3]),
                                                   Pair16<T>::pack(x[4], x[5]), Pair16<T>::pack(x[6], x[7])));
  }
};

template <typename T>
struct Vector<T, 4> {
  using A = float;
  using Raw = uint2;
  static __device__ __forceinline__ uint2 zero() { return make_uint2(0, 0); }
  static __device__ __forceinline__ uint2 load(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
  static __device__ __forceinline__ void unpack(uint2 raw, float (&out)[4]) {
    Pair16<T>::unpack(raw.x, out[0], out[1]);
    Pair16<T>::unpack(raw.y, out[2], out[3]);
  }
};

// address[i] += x[i], atomically. 16-byte reductions where the architecture has them; address is then 16-byte aligned.
template <typename A, int kCount>
__device__ __forceinline__ void atomic_add(A* address, const A (&x)[kCount]) {
  if constexpr (kCount % 4 == 0) {
    if (has_vector_reductions()) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) reduce_add_vector4(address + i, x[i], x[i + 1], x[i + 2], x[i + 3]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) reduce_add(address + i, x[i]);
}

template <typename T>
struct TypeOf {
  using Type = T;
};

// call(TypeOf<T>{}) with the element type of a dtype that vectors are made of: any but float64.
template <typename Call>
void with_type(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32: return call(TypeOf<float>{});
    case DType::kBFloat16: return call(TypeOf<__nv_bfloat16>{});
    default: return call(TypeOf<__half>{});
  }
}

// Scalars whose dtype is a kernel argument. All threads take the same branch, and no kernel per dtype is needed.
template <typename A>
__device__ __forceinline__ A load_scalar(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<A>(load_element(static_cast<const double*>(data) + index));
    case DType::kFloat32: return load_element(static_cast<const float*>(data) + index);
    case DType::kBFloat16: return to_accumulator(load_element(static_cast<const __nv_bfloat16*>(data) + index));
    default: return to_accumulator(load_element(static_cast<const __half*>(data) + index));
  }
}

template <typename A>
__device__ __forceinline__ void store_scalar(void* data, DType dtype, int64_t index, A x) {
  switch (dtype) {
    case DType::kFloat64: return store_element(static_cast<double*>(data) + index, static_cast<double>(x));
    case DType::kFloat32: return store_element(static_cast<float*>(data) + index, static_cast<float>(x));
    case DType::kBFloat16: return store_element(static_cast<__nv_bfloat16*>(data) + index, static_cast<float>(x));
    default: return store_element(static_cast<__half*>(data) + index, static_cast<float>(x));
  }
}

// Elements `index` and `index + 1`, in one access where `aligned` promises that the pair is aligned to its size.
template <typename A>
__device__ __forceinline__ void load_pair(const void* data, DType dtype, bool aligned, int64_t index, A& x, A& y) {
  if (aligned && dtype == DType::kFloat32) {
    const float2 pair = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(data) + index));
    x = pair.x;
    y = pair.y;
  } else if (aligned && (dtype == DType::kBFloat16 || dtype == DType::kFloat16)) {
    const unsigned int word = __ldg(reinterpret_cast<const unsigned int*>(static_cast<const uint16_t*>(data) + index));
    float low, high;
    if (dtype == DType::kBFloat16) {
      Pair16<__nv_bfloat16>::unpack(word, low, high);
    } else {
      Pair16<__half>::unpack(word, low, high);
    }
    x = low;
    y = high;
  } else {
    x = load_scalar<A>(data, dtype, index);
    y = load_scalar<A>(data, dtype, index + 1);
  }
}

// The same for a contiguous tensor of pairs that the allocator aligned.
template <typename A>
__device__ __forceinline__ void store_pair(void* data, DType dtype, int64_t index, A x, A y) {
  switch (dtype) {
    case DType::kFloat64: return store_scalar(data, dtype, index, x), store_scalar(data, dtype, index + 1, y);
    case DType::kFloat32:
      return __stcs(reinterpret_cast<float2*>(static_cast<float*>(data) + index),
                    make_float2(static_cast<float>(x), static_cast<float>(y)));
    case DType::kBFloat16:
      return __stcs(reinterpret_cast<unsigned int*>(static_cast<uint16_t*>(data) + index),
                    Pair16<__nv_bfloat16>::pack(static_cast<float>(x), static_cast<float>(y)));
    default:
      return __stcs(reinterpret_cast<unsigned int*>(static_cast<uint16_t*>(data) + index),
                    Pair16<__half>::pack(static_cast<float>(x), static_cast<float>(y)));
  }
}

}  // namespace m2f
