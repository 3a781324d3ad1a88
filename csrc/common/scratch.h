// Scratch memory of the CPU bindings: 64-byte aligned, freed with its owner.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace m2f {

struct FreeScratch {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<void, FreeScratch>;

inline Scratch allocate_scratch(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  STD_TORCH_CHECK(p != nullptr || bytes == 0, "m2f: could not allocate ", bytes, " bytes of scratch memory");
  return Scratch(p);
}

}  // namespace m2f
