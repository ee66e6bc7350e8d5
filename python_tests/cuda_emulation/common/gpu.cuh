// SPDX-License-Identifier: Apache-2.0
// csrc/common/gpu.cuh on a CPU: the tests put this folder first on the include path and compile kernels as C++.
//
// Each CUDA thread is a fiber. What a warp or a block does together (barriers, shuffles, ldmatrix, mma) waits until all its
// threads have come; between such calls threads run in a random order, one far ahead of another where nothing holds it back.
// An asynchronous copy spoils its destination with NaN when it starts and writes it at the first barrier after it was waited
// for; one that starts where its warp may still be reading by ldmatrix, no barrier between, is an error. So a missing wait or
// barrier shows, not only by luck of the timing.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <string>
#include <vector>

#define KVC_DEVICE inline
#define KVC_KERNEL(threads, blocks_per_multiprocessor) void
#define KVC_PARAMETERS(type) const type

namespace kvc {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

namespace emulation {

enum class Call { kNone, kSyncWarp, kShuffle, kVote, kLoadMatrices, kMultiplyAdd, kSyncBlock };

struct Copy {
  char* to;
  const char* from;
  int bytes;
  int64_t group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started, ended;
  int index;
  Call call;
  void* argument;
  int64_t group;
  std::vector<Copy> copies, waited;
};

// When ldmatrix last read 16 bytes of shared memory: by which warp, how many barriers of it and of the block had passed.
struct Read {
  int warp;
  int64_t warp_barriers, block_barriers;
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  // Runs one block of threads; returns what went wrong, or nothing.
  std::string run(const std::function<void()>& kernel, int64_t index, int threads, int shared_bytes) {
    kernel_ = &kernel;
    block_index = index;
    error_.clear();
    memory_.assign(shared_bytes + 2 * kGuard + 128, '\xff');
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    shared = memory_.data() + kGuard + (128 - begin % 128) % 128;
    this->shared_bytes = shared_bytes;
    reads_.assign(shared_bytes / 16 + 1, {-1, 0, 0});
    warp_barriers_.assign(threads / 32, 0);
    block_barriers_ = 0;
    fibers_.resize(threads);
    stacks_.resize(threads);
    ready_.clear();
    unfinished_ = threads;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers_[i];
      f.started = f.ended = false;
      f.index = i;
      f.call = Call::kNone;
      f.group = 0;
      f.copies.clear();
      f.waited.clear();
      stacks_[i].resize(kStack);
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = stacks_[i].data();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, &Block::enter, 0);
      ready_.push_back(i);
    }
    schedule();
    if (error_.empty() && unfinished_) error_ = "threads wait for others that never come";
    for (const char* p = memory_.data(); error_.empty() && p != memory_.data() + memory_.size(); ++p) {
      if ((p < shared || p >= shared + shared_bytes) && *p != '\xff') error_ = "a write beside the shared memory";
    }
    return error_;
  }

  Fiber& self() { return fibers_[running_]; }

  // Waits until every running thread of the group [first, first + count) is here; the last one to come runs `together`.
  template <class F>
  void meet(Call call, void* argument, int first, int count, F together) {
    Fiber& f = self();
    f.call = call;
    f.argument = argument;
    for (int i = first; i < first + count; ++i) {
      const Fiber& other = fibers_[i];
      if (other.ended && call != Call::kSyncBlock) fail("a thread of the warp has ended before the others");
      if (!other.ended && other.call == Call::kNone) return pause();
      if (!other.ended && other.call != call && call != Call::kSyncBlock) fail("the threads of a warp have parted");
      if (!other.ended && other.call != Call::kSyncBlock && call == Call::kSyncBlock) return pause();
    }
    together();
    for (int i = first; i < first + count; ++i) {
      if (fibers_[i].ended) continue;
      fibers_[i].call = Call::kNone;
      if (i != f.index) ready_.push_back(i);
    }
  }

  template <class Argument, class F>
  void meet_warp(Call call, Argument* argument, F together) {
    const int first = running_ / 32 * 32;
    meet(call, argument, first, 32, [&] {
      Argument* all[32];
      for (int i = 0; i < 32; ++i) all[i] = static_cast<Argument*>(fibers_[first + i].argument);
      together(all);
    });
  }

  void sync_warp() {
    const int first = running_ / 32 * 32;
    meet(Call::kSyncWarp, nullptr, first, 32, [&] {
      ++warp_barriers_[first / 32];
      for (int i = first; i < first + 32; ++i) finish_copies(fibers_[i]);
    });
  }

  void sync_block() {
    meet(Call::kSyncBlock, nullptr, 0, static_cast<int>(fibers_.size()), [&] { pass_block_barrier(); });
  }

  void note_read(const char* at) {
    const int warp = running_ / 32;
    reads_[(at - shared) / 16] = {warp, warp_barriers_[warp], block_barriers_};
  }

  void check_write(const char* at) {
    const int warp = running_ / 32;
    const Read& read = reads_[(at - shared) / 16];
    const bool safe = read.warp < 0 || read.block_barriers < block_barriers_ ||
                      (read.warp == warp && read.warp_barriers < warp_barriers_[warp]);
    if (!safe) fail("a copy to where others may still be reading");
  }

  char* in_shared(const void* p, int bytes) {
    char* at = static_cast<char*>(const_cast<void*>(p));
    if (at < shared || at + bytes > shared + shared_bytes) fail("an address beside the shared memory");
    if ((at - shared) % bytes) fail("a misaligned address in shared memory");
    return at;
  }

  [[noreturn]] void fail(const char* what) {
    error_ = what;
    _longjmp(scheduler_, 1);
  }

  int64_t block_index = 0;
  char* shared = nullptr;
  int shared_bytes = 0;
  uint64_t random = 1;
  int64_t bank_conflicts = 0;

 private:
  static constexpr int kGuard = 4096, kStack = 64 * 1024;

  static void enter() {
    Block& block = current();
    (*block.kernel_)();
    Fiber& f = block.self();
    if (!f.copies.empty() || !f.waited.empty()) block.fail("a thread ended with copies that nobody waited for");
    f.ended = true;
    --block.unfinished_;
    // Those at a barrier of the block may have waited for this one only.
    bool all_there = block.unfinished_ > 0;
    for (const Fiber& other : block.fibers_) all_there = all_there && (other.ended || other.call == Call::kSyncBlock);
    if (all_there) block.pass_block_barrier();
    for (Fiber& other : block.fibers_) {
      if (!all_there || other.ended) continue;
      other.call = Call::kNone;
      block.ready_.push_back(other.index);
    }
    _longjmp(block.scheduler_, 1);
  }

  void pass_block_barrier() {
    ++block_barriers_;
    for (int64_t& number : warp_barriers_) ++number;
    for (Fiber& f : fibers_) finish_copies(f);
  }

  static void finish_copies(Fiber& f) {
    for (const Copy& copy : f.waited) {
      if (copy.from) {
        memcpy(copy.to, copy.from, copy.bytes);
      } else {
        memset(copy.to, 0, copy.bytes);
      }
    }
    f.waited.clear();
  }

  void pause() {
    if (!_setjmp(self().resume)) _longjmp(scheduler_, 1);
  }

  void schedule() {
    _setjmp(scheduler_);
    if (!error_.empty() || ready_.empty()) return;
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    const size_t pick = random % ready_.size();
    running_ = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    Fiber& f = self();
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    setcontext(&f.start);
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<char> memory_;
  std::vector<Fiber> fibers_;
  std::vector<std::vector<char>> stacks_;
  std::vector<int> ready_;
  std::vector<Read> reads_;
  std::vector<int64_t> warp_barriers_;
  int64_t block_barriers_ = 0;
  int running_ = 0, unfinished_ = 0;
  std::string error_;
  jmp_buf scheduler_;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
}

inline uint16_t narrow(float x, Bf16) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t narrow(float x, Fp16) {
  const uint16_t sign = static_cast<uint16_t>(float_to_bits(x) >> 16 & 0x8000u);
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(nearbyintf(size * 0x1p24f));
  uint32_t bits = float_to_bits(size) - (112u << 23);
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
}

// The sum as tensor cores take it, or a little worse: products are exact, the result is cut off, not rounded.
inline float cut(double x) {
  const float nearest = static_cast<float>(x);
  return fabs(static_cast<double>(nearest)) > fabs(x) && isfinite(x) ? nextafterf(nearest, 0.0f) : nearest;
}

}  // namespace emulation

namespace gpu {

constexpr float kInfinity = __builtin_huge_valf();

inline emulation::Block& block() { return emulation::Block::current(); }
inline int thread_index() { return block().self().index; }
inline int block_index() { return static_cast<int>(block().block_index); }
inline char* shared_memory() { return block().shared; }
inline void sync_block() { block().sync_block(); }
inline void sync_warp() { block().sync_warp(); }

struct Shuffle {
  float value, result;
  int mask;
};
inline float shuffle_xor(float x, int mask) {
  Shuffle mine = {x, 0.0f, mask};
  block().meet_warp(emulation::Call::kShuffle, &mine, [](Shuffle** all) {
    for (int i = 0; i < 32; ++i) all[i]->result = all[i ^ all[i]->mask]->value;
  });
  return mine.result;
}

struct Vote {
  bool value;
  uint32_t result;
};
inline uint32_t ballot(bool x) {
  Vote mine = {x, 0};
  block().meet_warp(emulation::Call::kVote, &mine, [](Vote** all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]->value) << i;
    for (int i = 0; i < 32; ++i) all[i]->result = bits;
  });
  return mine.result;
}
inline bool any(bool x) { return ballot(x) != 0; }

inline void start_copy(void* shared, const void* global, int bytes, bool valid) {
  emulation::Fiber& f = block().self();
  char* to = block().in_shared(shared, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes) block().fail("a misaligned address in global memory");
  block().check_write(to);
  memset(to, 0xff, bytes);
  f.copies.push_back({to, valid ? static_cast<const char*>(global) : nullptr, bytes, f.group});
}
inline void copy_async_16(void* shared, const void* global, bool valid) { start_copy(shared, global, 16, valid); }
inline void copy_async_4(void* shared, const void* global) { start_copy(shared, global, 4, true); }
inline void copy_commit() { ++block().self().group; }
template <int kPending>
inline void copy_wait() {
  emulation::Fiber& f = block().self();
  std::vector<emulation::Copy> rest;
  for (const emulation::Copy& copy : f.copies) {
    (copy.group >= f.group - kPending ? rest : f.waited).push_back(copy);
  }
  f.copies.swap(rest);
}

struct Load {
  const char* row;
  uint32_t* to;
};
template <bool kTransposed>
inline void load_any_matrices(uint32_t (&to)[4], const void* row) {
  Load mine = {block().in_shared(row, 16), to};
  block().meet_warp(emulation::Call::kLoadMatrices, &mine, [](Load** all) {
    const auto element = [&](int matrix, int i, int j) {
      uint16_t x;
      memcpy(&x, all[matrix * 8 + i]->row + 2 * j, 2);
      return static_cast<uint32_t>(x);
    };
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        banks |= 1u << ((all[matrix * 8 + i]->row - block().shared) / 16 % 8);
        block().note_read(all[matrix * 8 + i]->row);
      }
      block().bank_conflicts += banks != 255;
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        all[lane]->to[matrix] = kTransposed ? element(matrix, j, i) | element(matrix, j + 1, i) << 16
                                            : element(matrix, i, j) | element(matrix, i, j + 1) << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { load_any_matrices<false>(to, row); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { load_any_matrices<true>(to, row); }

struct Operands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operands mine = {c, a, {b0, b1}};
  block().meet_warp(emulation::Call::kMultiplyAdd, &mine, [](Operands** all) {
    const auto half = [](uint32_t pair, int which) {
      return emulation::widen(T{static_cast<uint16_t>(pair >> 16 * which)});
    };
    double left[16][16], right[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) left[i + r % 2 * 8][j + r / 2 * 8 + e] = half(all[lane]->a[r], e);
        for (int r = 0; r < 2; ++r) right[i][j + r * 8 + e] = half(all[lane]->b[r], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const double* x = left[lane / 4 + r / 2 * 8];
        const double* y = right[lane % 4 * 2 + r % 2];
        float sum = all[lane]->c[r];
        for (int k = 0; k < 16; k += 8) {
          double eight = sum;
          for (int n = k; n < k + 8; ++n) eight += x[n] * y[n];
          sum = emulation::cut(eight);
        }
        all[lane]->c[r] = sum;
      }
    }
  });
}

template <class T>
inline uint32_t pack(float low, float high) {
  return emulation::narrow(low, T{}) | static_cast<uint32_t>(emulation::narrow(high, T{})) << 16;
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_precise(float x) { return log2f(x); }
inline float greater(float a, float b) { return fmaxf(a, b); }

}  // namespace gpu
}  // namespace kvc
