// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, for the emulation to find.
#include "common/gpu.cuh"

namespace kvc {
namespace {

enum Mistake { kNone, kNoWait, kNoWarpBarrier, kNoBlockBarrier, kEarlyRefill, kPartedWarp, kBesideMemory, kMisaligned };

// Two warps copy 512 bytes each to shared memory; each writes out what the other has copied, once by ldmatrix.
void kernel(int mistake, const uint16_t* in, uint32_t* out) {
  const int thread = gpu::thread_index(), warp = thread / 32, lane = thread % 32;
  char* own = gpu::shared_memory() + warp * 512;
  char* to = own + lane * 16;
  if (mistake == kBesideMemory) to += thread == 63 ? 512 : 0;
  if (mistake == kMisaligned) to += thread == 3 ? 8 : 0;
  gpu::copy_async_16(to, in + thread * 8, true);
  gpu::copy_commit();
  if (mistake == kNoWait) {
    gpu::copy_wait<1>();
  } else {
    gpu::copy_wait<0>();
  }
  if (mistake != kNoWarpBarrier) gpu::sync_warp();
  uint32_t words[4];
  gpu::load_matrices(words, own + lane * 16);
  if (mistake != kNoBlockBarrier) gpu::sync_block();
  float* exchange = reinterpret_cast<float*>(gpu::shared_memory() + 1024);
  exchange[thread] = static_cast<float>(words[0] & 0xffff);
  if (mistake != kNoBlockBarrier) gpu::sync_block();
  float x = exchange[thread ^ 32];
  if (!(mistake == kPartedWarp && lane == 5)) x = gpu::shuffle_xor(x, 1);
  out[thread] = static_cast<uint32_t>(x);
  if (mistake != kEarlyRefill) gpu::sync_warp();
  if (mistake == kEarlyRefill) gpu::load_matrices(words, own + lane * 16);
  gpu::copy_async_16(own + lane * 16, in, false);
  gpu::copy_commit();
  gpu::copy_wait<0>();
  gpu::sync_block();
}

}  // namespace
}  // namespace kvc

// What the emulation says of a mistake: an empty text if nothing, "wrong result" if only the result is wrong.
extern "C" __attribute__((visibility("default"))) const char* kvc_self_check(int mistake, uint64_t seed) {
  static std::string said;
  alignas(16) static uint16_t in[64 * 8];
  uint32_t out[64];
  for (int i = 0; i < 64 * 8; ++i) in[i] = static_cast<uint16_t>(i + 1);
  kvc::emulation::Block& block = kvc::emulation::Block::current();
  block.random = seed | 1;
  said = block.run([&] { kvc::kernel(mistake, in, out); }, 0, 64, 1024 + 256);
  for (int thread = 0; said.empty() && thread < 64; ++thread) {
    const int other = (thread ^ 32) ^ 1;  // its lane l holds row l / 4, columns 2 (l % 4) and the next, of its first matrix
    const int index = (other / 32 * 32 + other % 32 / 4) * 8 + other % 4 * 2;
    if (out[thread] != static_cast<uint32_t>(in[index])) said = "wrong result";
  }
  return said.c_str();
}
