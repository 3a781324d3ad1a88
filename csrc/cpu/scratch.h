// Memory of a task, cut into aligned pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace m2f {

// Hands out pieces aligned to 64 bytes. With a null base it only adds up their sizes.
struct Pieces {
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
