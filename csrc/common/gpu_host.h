// SPDX-License-Identifier: Apache-2.0
// What the host side of the CUDA kernels asks of the device. The tests shadow this file, as gpu.cuh, by an emulation.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <string>

// It lives in libtorch_cuda. Weak, so that this library can be linked and loaded beside a torch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

#define KVC_CUDA_CHECK(call)                                                                              \
  do {                                                                                                    \
    const cudaError_t error_ = (call);                                                                    \
    STD_TORCH_CHECK(error_ == cudaSuccess, "kvcompact: ", #call, " failed: ", cudaGetErrorString(error_)); \
  } while (0)
#define KVC_GPU_DISPATCH_KEY CUDA

#ifndef KVC_CUDA_CODE
#error "KVC_CUDA_CODE must name what the kernels are built to, as sm_80+compute_80: setup.py does"
#endif
#define KVC_TEXT_OF(x) #x
#define KVC_TEXT(x) KVC_TEXT_OF(x)

namespace kvc {

// The machine code (sm_*) and PTX (compute_*) of this library, joined by "+".
inline std::string cuda_code() { return KVC_TEXT(KVC_CUDA_CODE); }

// The GPU of a tensor, current as long as this lives, and its current stream. Waits for nothing.
class Gpu {
 public:
  explicit Gpu(const torch::stable::Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "kvcompact: this torch has no CUDA");
    // not by STABLE_TORCH_ERROR_CODE_CHECK, which the headers have since 2.13
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(index_, &stream_) == 0, "kvcompact: torch does not tell its CUDA stream");
  }

  static bool holds(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

  int64_t multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // How many blocks with so much dynamic shared memory fit on one multiprocessor, as far as that memory goes.
  int64_t resident_blocks(int64_t shared_bytes) const {
    return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) /
           (shared_bytes + attribute(cudaDevAttrReservedSharedMemoryPerBlock));
  }

  // A kernel that takes one struct, and `shared_bytes` of dynamic shared memory.
  template <class Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, const Params& params) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "kvcompact: a launch of ", blocks, " blocks is too large");
    if (shared_bytes > 48 * 1024) {
      KVC_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream_)>>>(params);
    KVC_CUDA_CHECK(cudaGetLastError());
  }

 private:
  int64_t attribute(cudaDeviceAttr which) const {
    int number = 0;
    KVC_CUDA_CHECK(cudaDeviceGetAttribute(&number, which, index_));
    return number;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace kvc
