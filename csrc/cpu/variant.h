// Names for code that is compiled once per instruction set: M2F_FOR_VARIANT(kernels) is kernels_avx2 for AVX2.
#pragma once

#if !defined(M2F_VARIANT)
#error "compile this file through CMake, which defines M2F_VARIANT"
#endif

#define M2F_JOIN_(a, b) a##_##b
#define M2F_JOIN(a, b) M2F_JOIN_(a, b)
#define M2F_FOR_VARIANT(name) M2F_JOIN(name, M2F_VARIANT)
