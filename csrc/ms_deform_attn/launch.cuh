// All that kernels need from their platform: the CUDA runtime, or its stand-in on the host (tests/cuda_on_host).
#pragma once

#ifdef M2F_CUDA_ON_HOST
#include "cuda_shim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>

// The block's dynamic shared memory.
#define M2F_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace m2f {

// Reductions of 16 bytes in one instruction, red.global.add.v4.f32.
__device__ __forceinline__ bool has_vector_reductions() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

__device__ __forceinline__ void reduce_add_vector4(float* address, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "f"(a), "f"(b),
               "f"(c), "f"(d));
#endif
}

// Used instead of atomicAdd, for which the compiler adds a loop for shared memory where it cannot tell that an address
// is global.
__device__ __forceinline__ void reduce_add(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "f"(x));
}
__device__ __forceinline__ void reduce_add(double* address, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "d"(x));
}

// A counter in shared memory, incremented atomically; returns what it was.
__device__ __forceinline__ int shared_increment(int* counter) { return atomicAdd(counter, 1); }

// base + index * row_bytes in one instruction. From C++ the compiler makes several, and repeats them for every access
// of a loop.
template <typename T>
__device__ __forceinline__ T* advance_rows(T* base, unsigned index, unsigned row_bytes) {
  T* out;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(out) : "r"(index), "r"(row_bytes), "l"(base));
  return out;
}

// A function, because the commas in <<<...>>> would split the arguments of a macro around a launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  // clang-format on
}

}  // namespace m2f

#endif
