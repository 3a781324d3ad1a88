// States what the library was built for. m2f_kernels/dispatch.py decides from it if this machine can run the library.
#include <cuda_runtime.h>

#define M2F_EXPORT extern "C" __attribute__((visibility("default")))

// Machine code and PTX, such as "sm_80 sm_90 compute_90".
M2F_EXPORT const char* m2f_cuda_code() { return M2F_CUDA_CODE; }

// The CUDA version of the build, 12080 for 12.8.
M2F_EXPORT int m2f_cuda_runtime_version() { return CUDART_VERSION; }

// The newest CUDA version that the driver supports; 0 without a driver. Does not initialise a device.
M2F_EXPORT int m2f_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
