// The instruction set in use, of those that the CPU kernels were compiled for.
#pragma once

namespace m2f {

enum class CpuCapability : int { kBaseline, kAVX2, kAVX512 };

// The best this CPU has, or what M2F_CPU_CAPABILITY or m2f_set_cpu_capability asked for.
CpuCapability cpu_capability();

}  // namespace m2f

// M2F_DECLARE_VARIANTS(void, name, (int x)) declares a function for each instruction set: name_baseline, name_avx2 and
// name_avx512. M2F_IN_USE(name) is the one of them for the instruction set in use.
#if defined(M2F_X86)
#define M2F_DECLARE_VARIANTS(result, name, parameters) \
  result name##_baseline parameters;                   \
  result name##_avx2 parameters;                       \
  result name##_avx512 parameters
#define M2F_IN_USE(name)                                      \
  (cpu_capability() == CpuCapability::kAVX512 ? name##_avx512 \
   : cpu_capability() == CpuCapability::kAVX2 ? name##_avx2   \
                                              : name##_baseline)
#else
#define M2F_DECLARE_VARIANTS(result, name, parameters) result name##_baseline parameters
#define M2F_IN_USE(name) name##_baseline
#endif

extern "C" {
// "avx512", "avx2" or "baseline".
__attribute__((visibility("default"))) const char* m2f_cpu_capability();
// 0 on success, 1 if the name is unknown or the CPU lacks it.
__attribute__((visibility("default"))) int m2f_set_cpu_capability(const char* name);
}
