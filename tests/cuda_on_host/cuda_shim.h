// CUDA C++ on the host, for tests: enough of the language to compile the kernels with a plain C++17 compiler and run
// them. Needs no CUDA toolkit.
//
// The threads of a block are fibers, run in turn, each until it waits at a barrier or warp operation; blocks run one
// after the other. So execution is deterministic, and a thread that should have waited for another and did not gets
// ahead of it as far as it can: missing barriers show. Three things are checked that a GPU would not report:
//   - all lanes named by the mask of a warp operation arrive at the same one, all threads of a block at the same
//   barrier;
//   - global accesses fall within a buffer the caller registered, and are aligned;
//   - shared memory is poisoned before each block and not written past its end.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct uint4 {
  unsigned int x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

// ---------------------------------------------------------------- 16-bit floats

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A float rounded to nearest even at a multiple of 2^exponent.
inline float round_to_multiple(float x, int exponent) {
  return static_cast<float>(ldexp(nearbyint(ldexp(static_cast<double>(x), -exponent)), exponent));
}

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const unsigned u = __float_as_uint(x);
    bits = x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (x != x) {
      bits = 0x7fff;
      return;
    }
    const float magnitude = fabsf(x);
    int exponent = magnitude == 0 ? -14 : ilogbf(magnitude);
    if (exponent < -14) exponent = -14;  // subnormal
    const float rounded = isinf(magnitude) ? magnitude : round_to_multiple(magnitude, exponent - 10);
    if (rounded >= 65520.0f || exponent > 15) {
      bits = sign | 0x7c00;
    } else {
      // In units of the last place above the smallest normal's exponent; a carry runs on into the exponent field.
      const int units = static_cast<int>(ldexpf(rounded, 10 - exponent));
      bits = static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
    }
  }
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }

inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31;
  const int mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude = exponent ? ldexpf(1024.0f + mantissa, exponent - 25) : ldexpf(static_cast<float>(mantissa), -24);
  }
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) { return __half(x); }

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }

// ---------------------------------------------------------------- threads

namespace m2f_shim {

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error("CUDA shim: " + message); }

struct Buffer {
  uintptr_t first, last;  // one past the end
};

// A place to go on from. Switching by swapcontext would ask the system for the signal mask each time.
using Jump = void* [5];

// Never returns. AddressSanitizer would take the stack that is left here for the whole one.
__attribute__((noinline, no_sanitize("address"))) inline void leap(Jump& to) { __builtin_longjmp(to, 1); }

// Goes on at `to` until somebody leaps to `from`.
__attribute__((noinline, no_sanitize("address"))) inline void change(Jump& from, Jump& to) {
  if (__builtin_setjmp(from) == 0) leap(to);
}

struct Thread {
  enum State { kReady, kAtWarpOperation, kAtBarrier, kDone };
  ucontext_t context;  // where it starts
  Jump jump;           // where it waits
  bool started;
  std::unique_ptr<unsigned char[]> stack;
  State state;
  dim3 index;
  const char* operation;
  int line;       // of the operation: all lanes must stand at the same one
  unsigned mask;  // lanes that take part
  int argument;   // xor mask; or, negative, how many lanes below
  unsigned char sent[8], received[8];
};

class Machine {
 public:
  // Runs one kernel over the whole grid.
  void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    if (block.x % 32 != 0 || block.y != 1 || block.z != 1) fail("expected a one-dimensional block of whole warps");
    if (shared_bytes > 48 * 1024) fail("a launch asks for more than 48 KB of shared memory");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("a launch with an empty grid");
    kernel_ = &kernel;
    grid_dim = grid;
    block_dim = block;
    while (threads_.size() < block.x) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->stack = std::make_unique<unsigned char[]>(kStackBytes);
    }
    shared_.assign(shared_bytes + kGuardBytes + 16, 0);
    for (block_index.z = 0; block_index.z < grid.z; ++block_index.z) {
      for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
        for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(shared_bytes);
      }
    }
  }

  unsigned char* shared_memory() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_.data()) + 15) / 16 * 16);
  }

  Thread& current() { return *current_; }

  // Waits for all lanes in `mask`; each receives what lane ^ argument sent, or with a negative argument lane +
  // argument, or where there is none what it sent itself.
  void warp_operation(const char* operation, int line, unsigned mask, int argument, const void* value, void* result,
                      size_t bytes) {
    Thread& self = *current_;
    const unsigned lane = self.index.x & 31;
    if (!(mask >> lane & 1)) fail(where(self, operation, line) + ": the mask does not name the calling lane");
    self.operation = operation;
    self.line = line;
    self.mask = mask;
    self.argument = argument;
    self.state = Thread::kAtWarpOperation;
    std::memcpy(self.sent, value, bytes);
    complete_warp_operation(self);
    while (self.state != Thread::kReady) yield();
    std::memcpy(result, self.received, bytes);
  }

  void barrier(int line) {
    Thread& self = *current_;
    self.operation = "__syncthreads";
    self.line = line;
    self.state = Thread::kAtBarrier;
    unsigned waiting = 0;
    for (unsigned i = 0; i < block_dim.x; ++i) waiting += threads_[i]->state == Thread::kAtBarrier;
    if (waiting == block_dim.x) {
      for (unsigned i = 0; i < block_dim.x; ++i) {
        if (threads_[i]->line != line) fail(where(*threads_[i]) + " while " + where(self));
        threads_[i]->state = Thread::kReady;
      }
    }
    while (self.state != Thread::kReady) yield();
  }

  void check_access(const void* pointer, size_t bytes, const char* access) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address % bytes != 0)
      fail(std::string(access) + ": a misaligned access of " + std::to_string(bytes) + " bytes");
    for (const Buffer& buffer : buffers) {
      if (address >= buffer.first && address + bytes <= buffer.last) return;
    }
    std::ostringstream message;
    message << access << " of " << bytes << " bytes outside every buffer, by thread " << current_->index.x
            << " of block (" << block_index.x << ", " << block_index.y << ")";
    fail(message.str());
  }

  dim3 grid_dim, block_dim, block_index;
  std::vector<Buffer> buffers;  // what kernels may access
  int architecture = 90;
  bool reversed = false;      // run threads from the last to the first
  int64_t reduced_bytes = 0;  // added to global memory

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr size_t kGuardBytes = 256;

  static void start() { machine().body(); }
  static Machine& machine();

  void body() {
    try {
      (*kernel_)();
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
    current_->state = Thread::kDone;
    change(current_->jump, scheduler_);
  }

  void yield() {
    change(current_->jump, scheduler_);
    if (error_) throw std::runtime_error("CUDA shim: another thread failed");
  }

  __attribute__((noinline)) void resume(Thread& thread) {
    if (thread.started) return change(scheduler_, thread.jump);
    thread.started = true;
    if (__builtin_setjmp(scheduler_) == 0) setcontext(&thread.context);
  }

  void run_block(size_t shared_bytes) {
    std::memset(shared_memory(), 0xff, shared_bytes);  // NaN as a float, -1 as an integer
    std::memset(shared_memory() + shared_bytes, 0x5a, kGuardBytes);
    error_ = nullptr;
    for (unsigned i = 0; i < block_dim.x; ++i) {
      Thread& thread = *threads_[i];
      thread.state = Thread::kReady;
      thread.started = false;
      thread.index = dim3(i, 0, 0);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Machine::start, 0);
    }
    unsigned alive = block_dim.x;
    while (alive > 0) {
      bool progress = false;
      for (unsigned i = 0; i < block_dim.x; ++i) {
        Thread& thread = *threads_[reversed ? block_dim.x - 1 - i : i];
        // After an error every waiting thread is resumed once, to unwind its stack.
        if (thread.state == Thread::kDone || (thread.state != Thread::kReady && !error_)) continue;
        progress = true;
        current_ = &thread;
        resume(thread);
        alive -= thread.state == Thread::kDone;
      }
      if (!progress) {
        std::string message = "no thread can go on:";
        for (unsigned i = 0; i < block_dim.x; ++i) message += "\n  " + where(*threads_[i]);
        error_ = std::make_exception_ptr(std::runtime_error("CUDA shim: " + message));
      }
    }
    if (error_) std::rethrow_exception(error_);
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (shared_memory()[shared_bytes + i] != 0x5a) fail("a write past the end of shared memory");
    }
  }

  void complete_warp_operation(const Thread& self) {
    const unsigned first = self.index.x & ~31u;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      const Thread& other = *threads_[first + lane];
      if (other.state != Thread::kAtWarpOperation) return;
      if (other.line != self.line || other.mask != self.mask || other.argument != self.argument) {
        fail(where(other) + " while " + where(self));
      }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      const int below = static_cast<int>(lane) + self.argument;
      const unsigned source = self.argument >= 0 ? lane ^ self.argument : below < 0 ? lane : below;
      if (source > 31 || !(self.mask >> source & 1)) fail(where(self) + ": reads a lane outside the mask");
      Thread& other = *threads_[first + lane];
      std::memcpy(other.received, threads_[first + source]->sent, sizeof(other.received));
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (self.mask >> lane & 1) threads_[first + lane]->state = Thread::kReady;
    }
  }

  static std::string where(const Thread& thread, const char* operation, int line) {
    std::ostringstream out;
    out << "thread " << thread.index.x << " waits at " << operation << " (line " << line << ")";
    return out.str();
  }
  static std::string where(const Thread& thread) {
    if (thread.state == Thread::kDone) return "thread " + std::to_string(thread.index.x) + " has returned";
    return where(thread, thread.operation, thread.line);
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<unsigned char> shared_;
  Thread* current_ = nullptr;
  Jump scheduler_;
  std::exception_ptr error_;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}
inline Machine& Machine::machine() { return m2f_shim::machine(); }

}  // namespace m2f_shim

#define threadIdx (m2f_shim::machine().current().index)
#define blockIdx (m2f_shim::machine().block_index)
#define blockDim (m2f_shim::machine().block_dim)
#define gridDim (m2f_shim::machine().grid_dim)

#define M2F_DYNAMIC_SHARED(name) unsigned char* const name = m2f_shim::machine().shared_memory()

// ---------------------------------------------------------------- synchronisation

inline void __syncthreads(int line = __builtin_LINE()) { m2f_shim::machine().barrier(line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  char nothing = 0;
  m2f_shim::machine().warp_operation("__syncwarp", line, mask, 0, &nothing, &nothing, 1);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8, "one register or two");
  T result;
  m2f_shim::machine().warp_operation("__shfl_xor_sync", line, mask, lane_mask, &value, &result, sizeof(T));
  return result;
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int line = __builtin_LINE()) {
  T result;
  m2f_shim::machine().warp_operation("__shfl_up_sync", line, mask, -delta, &value, &result, sizeof(T));
  return result;
}

// By five exchanges; the line is that of the caller in each.
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  for (int lane_mask = 1; lane_mask < 32; lane_mask *= 2) {
    predicate = __shfl_xor_sync(mask, predicate != 0, lane_mask, line) && predicate;
  }
  return predicate;
}

// ---------------------------------------------------------------- global memory

template <typename T>
inline T __ldg(const T* pointer) {
  m2f_shim::machine().check_access(pointer, sizeof(T), "a load");
  return *pointer;
}

template <typename T>
inline void __stcs(T* pointer, T value) {
  m2f_shim::machine().check_access(pointer, sizeof(T), "a store");
  *pointer = value;
}

namespace m2f {

inline bool has_vector_reductions() { return m2f_shim::machine().architecture >= 90; }

inline void reduce_add_vector4(float* address, float a, float b, float c, float d) {
  m2f_shim::machine().check_access(address, 16, "a vector reduction");
  m2f_shim::machine().reduced_bytes += 16;
  address[0] += a;
  address[1] += b;
  address[2] += c;
  address[3] += d;
}

template <typename T>
inline void reduce_add(T* address, T x) {
  m2f_shim::machine().check_access(address, sizeof(T), "a reduction");
  m2f_shim::machine().reduced_bytes += sizeof(T);
  *address += x;
}

inline int shared_increment(int* counter) { return (*counter)++; }

template <typename T>
inline T* advance_rows(T* base, unsigned index, unsigned row_bytes) {
  // As an integer: the base may be null where nothing is accessed.
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + static_cast<uint64_t>(index) * row_bytes);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  m2f_shim::machine().run([&] { kernel(arguments...); }, grid, block, shared_bytes);
}

}  // namespace m2f
