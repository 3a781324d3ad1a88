// Scratch memory of a task, cut into aligned pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace m2f {

// Hands out 64-byte aligned pieces; with a null base it only measures.
struct Scratch {
  char* base;
  size_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

}  // namespace m2f
