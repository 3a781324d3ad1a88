#include "cpu/capability.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace m2f {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

CpuCapability best() {
#if defined(M2F_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuCapability::kAVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuCapability::kAVX2;
#endif
  return CpuCapability::kBaseline;
}

// -1 if the name is unknown or more than the CPU has.
int parse(const char* name) {
  for (int i = 0; i <= static_cast<int>(best()); ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i;
  return -1;
}

std::atomic<int>& current() {
  static std::atomic<int> value = [] {
    const char* wish = std::getenv("M2F_CPU_CAPABILITY");
    const int parsed = wish ? parse(wish) : -1;
    return parsed >= 0 ? parsed : static_cast<int>(best());
  }();
  return value;
}

}  // namespace

CpuCapability cpu_capability() { return static_cast<CpuCapability>(current().load(std::memory_order_relaxed)); }

}  // namespace m2f

extern "C" const char* m2f_cpu_capability() { return m2f::kNames[m2f::current().load()]; }

extern "C" int m2f_set_cpu_capability(const char* name) {
  const int parsed = m2f::parse(name);
  if (parsed < 0) return 1;
  m2f::current().store(parsed);
  return 0;
}
