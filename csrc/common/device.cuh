// What the CUDA kernels share on the device: conversions that round once, 16-byte vectors, warp sums, and minimum and
// maximum of floats by integer atomics; on the host, the launch.
//
// Without nvcc the same sources compile against tests/kernels/cuda_emulation.h, which runs them thread by thread on the
// CPU: that is how the tests reach the kernels where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#ifdef __CUDACC__
#include "cuda.h"
#else
#include "cuda_emulation.h"
#endif

namespace bkdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

#ifdef __CUDACC__
// Launches on the current stream of the tensor's device, which is the current device while the object lives.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& tensor)
      : op_(op), guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    if (blocks <= 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, op_, ": too large for one launch (", blocks, " blocks); split the call");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    check_launch(op_);
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T values[kSize];
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Acc>
__device__ __forceinline__ Acc widen(float value) {
  return static_cast<Acc>(value);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(double value) {
  return static_cast<Acc>(value);
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__half value) {
  return static_cast<Acc>(__half2float(value));
}
template <typename Acc>
__device__ __forceinline__ Acc widen(__nv_bfloat16 value) {
  return static_cast<Acc>(__bfloat162float(value));
}

template <typename T, typename Acc>
__device__ __forceinline__ T narrow(Acc value) {
  if constexpr (sizeof(T) > 2) {
    return static_cast<T>(value);
  } else {
    static_assert(sizeof(Acc) == 4, "a float64 would round twice on its way to 16 bits");
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  }
}

template <typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc value) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) value += __shfl_xor_sync(kFullWarp, value, other);
  return value;
}

// Floats of one sign order like their bits, of the other against them; every update moves one way only, so signed and
// unsigned atomics mix. The result does not depend on the order of the updates, -0 and +0 included. No NaN may enter.
__device__ __forceinline__ void atomic_min(float* address, float value) {
  if (__float_as_int(value) >= 0) {
    atomicMin(reinterpret_cast<int*>(address), __float_as_int(value));
  } else {
    atomicMax(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(__float_as_int(value)));
  }
}

__device__ __forceinline__ void atomic_max(float* address, float value) {
  if (__float_as_int(value) >= 0) {
    atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(__float_as_int(value)));
  }
}

}  // namespace bkdfast
