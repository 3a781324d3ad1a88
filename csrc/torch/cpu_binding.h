// Shared by the CPU bindings: tensors as rows, and scratch memory.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

#include "cpu/rows.h"
#include "torch/args.h"

namespace m2f {

// Rows addressed by the first three axes of a tensor; the other axes are contiguous.
inline Rows rows_of(const Tensor& tensor, const char* name) {
  return {tensor.data_ptr(), dtype_of(tensor, name), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

// Memory aligned to 64 bytes, freed with its owner.
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
