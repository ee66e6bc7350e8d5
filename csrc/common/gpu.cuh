// SPDX-License-Identifier: Apache-2.0
// The instructions that the CUDA kernels are written in, one thin function each. Kernels use nothing else of CUDA, so that
// the tests can compile them as C++ against an emulation of this file (python_tests/cuda_emulation/common/gpu.cuh).
#pragma once
#include <stdint.h>

#define KVC_DEVICE __device__ __forceinline__
// Parameters are read where they lie, also those that are indexed at run time.
#define KVC_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define KVC_PARAMETERS(type) const __grid_constant__ type

namespace kvc {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

namespace gpu {

constexpr float kInfinity = __builtin_huge_valf();

KVC_DEVICE int thread_index() { return threadIdx.x; }
KVC_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
KVC_DEVICE void sync_block() { __syncthreads(); }
KVC_DEVICE void sync_warp() { __syncwarp(); }
KVC_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
KVC_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }
KVC_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

// The block's dynamic shared memory, 16-byte aligned.
KVC_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

KVC_DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// Starts a copy of 16 bytes; where `valid` is false it writes zeros and reads nothing. Past L1: the data is used once.
KVC_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
KVC_DEVICE void copy_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Closes the group of copies that this thread has started since the last commit.
KVC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's newest groups are unfinished.
template <int kPending>
KVC_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 j + i holds the address of row i of matrix j. Lane l gets of each matrix
// the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1), transposed: (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
KVC_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
KVC_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a of 16 x 16, b of 16 x 8. Lane l holds of c: (l / 4, 2 (l % 4) + {0, 1}), then the same 8 rows below; of
// a: the pairs (l / 4, 2 (l % 4)), 8 rows below, 8 columns to the right, both; of b: (2 (l % 4), l / 4), 8 rows below.
template <class T>
KVC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
KVC_DEVICE void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
KVC_DEVICE void multiply_add<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to nearest even, the first in the low half.
template <class T>
KVC_DEVICE uint32_t pack(float low, float high);
template <>
KVC_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
KVC_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 2^x to two units in the last place; 0 for -inf.
KVC_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KVC_DEVICE float log2_precise(float x) { return log2f(x); }
KVC_DEVICE float greater(float a, float b) { return fmaxf(a, b); }

}  // namespace gpu
}  // namespace kvc
