// SPDX-License-Identifier: Apache-2.0
// csrc/common/gpu_host.h on a CPU: launches run in the emulation, one block after the other, and are done when they return.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>

#include "common/gpu.cuh"

#define KVC_GPU_DISPATCH_KEY CPU

namespace kvc {

inline int64_t emulated_multiprocessors = 2;
inline int64_t emulated_launches = 0;

inline std::string cuda_code() { return "sm_80+sm_90a+compute_80"; }

class Gpu {
 public:
  explicit Gpu(const torch::stable::Tensor&) {}
  static bool holds(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
  int64_t multiprocessors() const { return emulated_multiprocessors; }
  int64_t resident_blocks(int64_t shared_bytes) const { return 228 * 1024 / (shared_bytes + 1024); }  // an H100's

  template <class Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, const Params& params) const {
    ++emulated_launches;
    for (int64_t i = 0; i < blocks; ++i) {
      const std::string error = emulation::Block::current().run([&] { kernel(params); }, i, threads, shared_bytes);
      STD_TORCH_CHECK(error.empty(), "emulated kernel: ", error);
    }
  }
};

}  // namespace kvc

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))
KVC_EXPORT void kvc_emulation_seed(uint64_t seed) { kvc::emulation::Block::current().random = seed | 1; }
KVC_EXPORT void kvc_emulation_multiprocessors(int64_t number) { kvc::emulated_multiprocessors = number; }
KVC_EXPORT int64_t kvc_emulation_launches() { return kvc::emulated_launches; }
KVC_EXPORT int64_t kvc_emulation_bank_conflicts() { return kvc::emulation::Block::current().bank_conflicts; }
