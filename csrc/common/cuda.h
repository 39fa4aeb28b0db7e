// What every CUDA kernel of the library needs on the host side: the caller's stream and device, and launch checks.
//
// The library links no libtorch_cuda, so that one file loads with a CPU-only torch and with a CUDA one. PyTorch's
// current stream is therefore looked up at run time in the libtorch_cuda that the process has loaded already.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace bkdfast {

inline cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda is not loaded, or has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "the current CUDA stream of device ", device, " is not known");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace bkdfast
