// SPDX-License-Identifier: Apache-2.0
// Compact attention for short queries on NVIDIA GPUs of compute capability 8.0 and newer: device code, no torch headers.
//
// A block of four warps owns 16 query rows of a KV head and one split of the keys they read: slots of every block, then the
// tail, 16 keys at a time. Reading them is what decoding costs, so the warps are independent while they read: each takes
// every fourth tile of 16 keys through asynchronous copies into shared memory of its own, kStages tiles deep, and keeps its own
// maximum, sum and accumulator. No barrier of the block stands in the loop. The four results are joined at the end; those of
// several splits are joined by a second launch (merge). A last block to finish could do it in the first launch, but its
// counters would have to outlive the call at zero, and calls on two streams would share them.
#pragma once
#include <stdint.h>

#include "common/gpu.cuh"

namespace kvc {

// Keys at one stride: a block's slots, or the tail. Strides are in elements: request (0 for a shared block), KV head, key.
struct DecodeSegment {
  const void* keys;
  const void* values;
  const float* beta;       // null: none
  const int64_t* offsets;  // of ragged heads; null: every head has `length` keys
  int64_t key_strides[3], value_strides[3], beta_strides[3];
  int64_t offset_stride;
  int32_t length;
};

constexpr int kMaxDecodeBlocks = 8;

// Two kinds of blocks of threads: those of one request's own slots and tail, and those of slots that all requests share,
// whose rows are the stacked queries of all requests. The first come last in the grid. Row r of a KV head of one request
// is position r / group, head kv_head * group + r % group.
struct Decode {
  DecodeSegment segments[kMaxDecodeBlocks + 1];  // own blocks, the tail if there is one, shared blocks
  const void* query;
  int64_t query_strides[3];   // request, head, position; in elements
  const uint8_t* tail_mask;   // [B, Tt]; null: all may be attended
  int64_t mask_strides[2];
  void* out;                  // [B, H, Lq, d]
  float* lse;                 // [B, H, Lq], natural log
  float* partial_out;         // [B, H, Lq][parts][d]: sums of p * v; null: one part, which is final
  float* partial_stats;       // [B, H, Lq][parts][2]: maximum of the scores and sum of p, both in powers of two
  float scale_log2;
  int32_t batch, kv_heads, group, query_len;
  int32_t tail_length, window;  // window: negative for none
  bool causal, has_tail;
  int32_t own_segments;         // the tail included
  int32_t shared_segments;
  int32_t own_tiles, shared_tiles;    // of 16 rows
  int32_t own_splits, shared_splits;  // parts of a row: those of its own keys, then those of shared keys
};

struct DecodeMerge {
  const float* partial_out;
  const float* partial_stats;
  void* out;
  float* lse;
  int32_t parts;
};

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kTileRows = 16;
constexpr int kTileKeys = 16;

// Depth of a warp's pipeline, and blocks on a multiprocessor: together 130 KiB or more of copies in flight on an H100, whose
// 228 KiB of shared memory hold so many blocks, each with 1 KiB that the system takes.
template <int kDim>
constexpr int kDecodeStages = kDim <= 96 ? 3 : 2;
template <int kDim>
constexpr int kDecodeResidency = kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1;

// Shared memory of a block in bytes. A row has 16 bytes more than its elements: eight rows of 16 bytes, as ldmatrix reads
// them, then lie in different banks.
template <int kDim>
struct DecodeShared {
  static constexpr int kRow = 2 * kDim + 16;
  static constexpr int kTile = kTileKeys * kRow;
  static constexpr int kStage = 2 * kTile + kTileKeys * 4;  // keys, values, biases
  static constexpr int kPipeline = kDecodeWarps * kDecodeStages<kDim> * kStage;
  static constexpr int kQueries = kTileRows * kRow;
  // After the loop the pipeline's memory holds what the warps have found.
  static constexpr int kSumsRow = kDim + 4;  // floats
  static constexpr int kSums = kDecodeWarps * kTileRows * kSumsRow * 4;
  static constexpr int kStats = kDecodeWarps * kTileRows * 2 * 4;
  static constexpr int kBytes = kQueries + kPipeline;
  static_assert(kSums + kStats <= kPipeline, "the warps' results fit where the pipeline was");
  static_assert(kDecodeResidency<kDim> * (kBytes + 1024) <= 228 * 1024, "so many blocks fit on a multiprocessor of an H100");
};

namespace decode {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int32_t kNever = 0x7fffffff;

KVC_DEVICE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
KVC_DEVICE int32_t greatest(int32_t a, int32_t b) { return a > b ? a : b; }
KVC_DEVICE int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// What a block of threads works on.
struct Task {
  int32_t request, kv_head;  // of stacked rows the request is 0
  int32_t first_row, rows;   // of the tile; rows of the KV head in all
  int32_t split, splits, part;
  int32_t first_segment, segments;
  bool stacked;
};

KVC_DEVICE Task find_task(const Decode& p) {
  Task t;
  int32_t block = gpu::block_index();
  const int32_t shared_blocks = p.kv_heads * p.shared_splits * p.shared_tiles;
  t.stacked = block < shared_blocks;
  if (!t.stacked) block -= shared_blocks;
  const int32_t tiles = t.stacked ? p.shared_tiles : p.own_tiles;
  t.splits = t.stacked ? p.shared_splits : p.own_splits;
  // Tiles of rows that read the same keys are neighbours: all but the first find them in L2.
  t.first_row = block % tiles * kTileRows;
  block /= tiles;
  t.split = block % t.splits;
  block /= t.splits;
  t.kv_head = block % p.kv_heads;
  t.request = block / p.kv_heads;
  t.rows = p.query_len * p.group * (t.stacked ? p.batch : 1);
  t.part = t.stacked ? p.own_splits + t.split : t.split;
  t.first_segment = t.stacked ? p.own_segments : 0;
  t.segments = t.stacked ? p.shared_segments : p.own_segments;
  return t;
}

struct RowPlace {
  int32_t request, head, position;
};

KVC_DEVICE RowPlace place(const Decode& p, const Task& t, int32_t row) {
  const int32_t rows_per_request = p.query_len * p.group;
  const int32_t rest = row % rows_per_request;
  return {t.request + row / rows_per_request, t.kv_head * p.group + rest % p.group, rest / p.group};
}

// Keys of the tail that some row of the tile sees.
struct Range {
  int32_t begin, end;
};

KVC_DEVICE Range visible_tail(const Decode& p, const Task& t) {
  const int32_t last_row = least(t.first_row + kTileRows, t.rows) - 1;
  const int32_t before = p.tail_length - p.query_len;
  const int32_t begin = p.window < 0 ? 0 : greatest(0, before + t.first_row / p.group - p.window + 1);
  const int32_t end = p.causal ? greatest(0, least(before + last_row / p.group + 1, p.tail_length)) : p.tail_length;
  return {begin, greatest(begin, end)};
}

// First key and number of keys of one segment for the task; `row` is where they begin among packed rows.
struct Extent {
  int64_t row;
  int32_t begin, end;
};

KVC_DEVICE Extent extent(const Decode& p, const Task& t, int32_t segment, Range tail) {
  const DecodeSegment& s = p.segments[segment];
  if (p.has_tail && segment == p.own_segments - 1) return {0, tail.begin, tail.end};
  if (s.offsets == nullptr) return {0, 0, s.length};
  const int64_t index = static_cast<int64_t>(t.request) * p.kv_heads + t.kv_head;
  const int64_t first = s.offsets[index * s.offset_stride];
  return {first, 0, static_cast<int32_t>(s.offsets[(index + 1) * s.offset_stride] - first)};
}

// Walks a warp's tiles in the order in which they are loaded, across segments.
template <class T, int kDim>
class Loader {
 public:
  KVC_DEVICE Loader(const Decode& p, const Task& t, Range tail, int32_t tile, int32_t end, int lane)
      : p_(p), t_(t), tail_(tail), lane_(lane), tile_(tile), end_(end), segment_(t.first_segment), first_tile_(0) {
    if (tile_ < end_) open();
  }

  // Starts the copies of the next tile into `stage`; after the last tile, none.
  KVC_DEVICE void load(char* stage) {
    using Shared = DecodeShared<kDim>;
    if (tile_ >= end_) return;
    while (tile_ >= last_tile_) {
      first_tile_ = last_tile_;
      ++segment_;
      open();
    }
    const int32_t first = begin_ + (tile_ - first_tile_) * kTileKeys;
    const int32_t count = least(key_end_ - first, kTileKeys);
    uint32_t valid = (1u << count) - 1;
    if (mask_ != nullptr) {
      valid = gpu::ballot(lane_ < count && mask_[(first + static_cast<int64_t>(lane_)) * p_.mask_strides[1]] != 0);
    }
    // Where a key is not valid the address may lie past the end; nothing is read there.
    const int row = lane_ / kLanes, chunk = lane_ % kLanes;
    const T* keys = keys_ + first * key_stride_;
    const T* values = values_ + first * value_stride_;
    char* to = stage + row * Shared::kRow + chunk * 16;
    const uint32_t lane_valid = valid >> row;
#pragma unroll
    for (int i = 0; i < kTileKeys; i += kRows) {
      const bool ok = lane_valid >> i & 1;
#pragma unroll
      for (int j = 0; j < kChunks; j += kLanes) {
        gpu::copy_async_16(to + i * Shared::kRow + j * 16, keys + j * 8, ok);
        gpu::copy_async_16(to + Shared::kTile + i * Shared::kRow + j * 16, values + j * 8, ok);
      }
      keys += kRows * key_stride_;
      values += kRows * value_stride_;
    }
    if (lane_ < kTileKeys) {
      float* bias = reinterpret_cast<float*>(stage + 2 * Shared::kTile) + lane_;
      const bool ok = valid >> lane_ & 1;
      if (ok && beta_ != nullptr) {
        gpu::copy_async_4(bias, beta_ + (first + static_cast<int64_t>(lane_)) * beta_stride_);
      } else {
        *bias = ok ? 0.0f : -gpu::kInfinity;
      }
    }
    tile_ += kDecodeWarps;
  }

 private:
  // Of a tile's 16-byte chunks a warp copies kRows rows of kLanes chunks at once.
  static constexpr int kChunks = kDim / 8;
  static constexpr int kLanes = kChunks % 8 == 0 ? kChunks : 4;
  static constexpr int kRows = 32 / kLanes;
  static_assert(kChunks % kLanes == 0 && kTileKeys % kRows == 0 && kLanes <= 32, "copies fill the tile");

  KVC_DEVICE void open() {
    const DecodeSegment& s = p_.segments[segment_];
    const Extent e = extent(p_, t_, segment_, tail_);
    begin_ = e.begin;
    key_end_ = e.end;
    last_tile_ = first_tile_ + ceil_div(e.end - e.begin, kTileKeys);
    key_stride_ = s.key_strides[2];
    value_stride_ = s.value_strides[2];
    beta_stride_ = s.beta_strides[2];
    const int64_t row = e.row + lane_ / kLanes;
    const int column = lane_ % kLanes * 8;
    keys_ = static_cast<const T*>(s.keys) + at(s.key_strides, row) + column;
    values_ = static_cast<const T*>(s.values) + at(s.value_strides, row) + column;
    beta_ = s.beta == nullptr ? nullptr : s.beta + at(s.beta_strides, e.row);
    const bool is_tail = p_.has_tail && segment_ == p_.own_segments - 1;
    mask_ = is_tail && p_.tail_mask != nullptr ? p_.tail_mask + t_.request * p_.mask_strides[0] : nullptr;
  }

  KVC_DEVICE int64_t at(const int64_t (&strides)[3], int64_t row) const {
    return t_.request * strides[0] + t_.kv_head * strides[1] + row * strides[2];
  }

  const Decode& p_;
  const Task& t_;
  const Range tail_;
  const int lane_;
  int32_t tile_, end_, segment_, first_tile_, last_tile_, begin_, key_end_;
  const T* keys_;
  const T* values_;
  const float* beta_;
  const uint8_t* mask_;
  int64_t key_stride_, value_stride_, beta_stride_;
};

template <class T, int kDim>
KVC_DEVICE void load_queries(const Decode& p, const Task& t, char* shared) {
  constexpr int kChunks = kDim / 8;
  for (int i = gpu::thread_index(); i < kTileRows * kChunks; i += kDecodeThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool ok = t.first_row + row < t.rows;
    const RowPlace at = place(p, t, ok ? t.first_row + row : t.first_row);
    const T* from = static_cast<const T*>(p.query) + at.request * p.query_strides[0] + at.head * p.query_strides[1] +
                    at.position * p.query_strides[2] + chunk * 8;
    gpu::copy_async_16(shared + row * DecodeShared<kDim>::kRow + chunk * 16, from, ok);
  }
}

struct alignas(16) Four {
  float x[4];
};

// Scores of 16 rows against 16 keys as the two 16 x 8 results of a warp's matrix products.
struct Scores {
  float x[2][4];
};

// Address of the row that `lane` names for load_matrices: of the left operand's 16 x 16 elements at `column`.
template <int kDim>
KVC_DEVICE const char* query_row(const char* queries, int lane, int column) {
  return queries + (lane % 16) * DecodeShared<kDim>::kRow + (column + lane / 16 * 8) * 2;
}
template <int kDim>
KVC_DEVICE const char* key_row(const char* keys, int lane, int column) {
  return keys + (lane / 16 * 8 + lane % 8) * DecodeShared<kDim>::kRow + (column + lane / 8 % 2 * 8) * 2;
}
template <int kDim>
KVC_DEVICE const char* value_row(const char* values, int lane, int column) {
  return values + (lane % 16) * DecodeShared<kDim>::kRow + (column + lane / 16 * 8) * 2;
}

}  // namespace decode

template <class T, int kDim>
KVC_KERNEL(kDecodeThreads, kDecodeResidency<kDim>)
decode_attention(KVC_PARAMETERS(Decode) p) {
  using namespace decode;
  using Shared = DecodeShared<kDim>;
  constexpr int kStages = kDecodeStages<kDim>;
  constexpr int kSteps = kDim / 16;
  constexpr bool kQueriesInRegisters = kDim <= 128;

  char* const memory = gpu::shared_memory();
  char* const queries = memory;
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  char* const pipeline = memory + Shared::kQueries + warp * kStages * Shared::kStage;

  const Task t = find_task(p);
  const Range tail = visible_tail(p, t);
  int32_t slot_tiles = 0, tail_tiles = 0;
  for (int32_t s = 0; s < t.segments; ++s) {
    const Extent e = extent(p, t, t.first_segment + s, tail);
    const int32_t tiles = ceil_div(e.end - e.begin, kTileKeys);
    (!t.stacked && p.has_tail && s == t.segments - 1 ? tail_tiles : slot_tiles) += tiles;
  }
  const int32_t share = ceil_div(slot_tiles + tail_tiles, t.splits);
  const int32_t begin = least(t.split * share, slot_tiles + tail_tiles);
  const int32_t end = least(begin + share, slot_tiles + tail_tiles);

  // The first group of copies has the first tile and the queries.
  Loader<T, kDim> loader(p, t, tail, begin + warp, end, lane);
  loader.load(pipeline);
  load_queries<T, kDim>(p, t, queries);
  gpu::copy_commit();
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    loader.load(pipeline + stage * Shared::kStage);
    gpu::copy_commit();
  }
  gpu::copy_wait<kStages - 1>();
  gpu::sync_block();

  uint32_t query[kQueriesInRegisters ? kSteps : 1][4];
  if constexpr (kQueriesInRegisters) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) gpu::load_matrices(query[i], query_row<kDim>(queries, lane, i * 16));
  }

  // The two rows of this lane, and the tail's tokens that they see: lower < token <= upper.
  float maximum[2] = {-gpu::kInfinity, -gpu::kInfinity}, sum[2] = {0.0f, 0.0f};
  int32_t lower[2], upper[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t own = p.tail_length - p.query_len + (t.first_row + lane / 4 + i * 8) / p.group;
    upper[i] = p.causal ? own : kNever;
    lower[i] = p.window < 0 ? -1 : greatest(own - p.window, -1);
  }
  float sums[kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
  }

  int stage_index = 0;
  for (int32_t tile = begin + warp; tile < end; tile += kDecodeWarps) {
    char* const stage = pipeline + stage_index * Shared::kStage;
    gpu::copy_wait<kStages - 1>();
    gpu::sync_warp();  // the other lanes' copies too

    Scores s = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t key[4];
      gpu::load_matrices(key, key_row<kDim>(stage, lane, i * 16));
      if constexpr (kQueriesInRegisters) {
        gpu::multiply_add<T>(s.x[0], query[i], key[0], key[1]);
        gpu::multiply_add<T>(s.x[1], query[i], key[2], key[3]);
      } else {
        uint32_t loaded[4];
        gpu::load_matrices(loaded, query_row<kDim>(queries, lane, i * 16));
        gpu::multiply_add<T>(s.x[0], loaded, key[0], key[1]);
        gpu::multiply_add<T>(s.x[1], loaded, key[2], key[3]);
      }
    }

    const float* bias = reinterpret_cast<const float*>(stage + 2 * Shared::kTile);
    const bool in_tail = tile >= slot_tiles;
    const int32_t first = tail.begin + (tile - slot_tiles) * kTileKeys;
    const int32_t after[2] = {in_tail ? lower[0] - first : -1, in_tail ? lower[1] - first : -1};
    const int32_t upto[2] = {in_tail ? upper[0] - first : kNever, in_tail ? upper[1] - first : kNever};
    float peak[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = j * 8 + lane % 4 * 2 + e % 2, row = e / 2;
        const bool seen = column <= upto[row] && column > after[row];
        const float x = seen ? s.x[j][e] * p.scale_log2 + bias[column] * kLog2E : -gpu::kInfinity;
        s.x[j][e] = x;
        peak[row] = gpu::greater(peak[row], x);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      peak[i] = gpu::greater(peak[i], gpu::shuffle_xor(peak[i], 1));
      peak[i] = gpu::greater(peak[i], gpu::shuffle_xor(peak[i], 2));
    }
    if (gpu::any(peak[0] != maximum[0] || peak[1] != maximum[1])) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float rescale = peak[i] == maximum[i] ? 1.0f : gpu::exp2_fast(maximum[i] - peak[i]);
        maximum[i] = peak[i];
        sum[i] *= rescale;
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) {
          sums[j][2 * i] *= rescale;
          sums[j][2 * i + 1] *= rescale;
        }
      }
    }
    const float reference[2] = {
        maximum[0] == -gpu::kInfinity ? 0.0f : maximum[0], maximum[1] == -gpu::kInfinity ? 0.0f : maximum[1]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s.x[j][e] = gpu::exp2_fast(s.x[j][e] - reference[e / 2]);
        sum[e / 2] += s.x[j][e];
      }
    }
    const uint32_t probabilities[4] = {
        gpu::pack<T>(s.x[0][0], s.x[0][1]), gpu::pack<T>(s.x[0][2], s.x[0][3]), gpu::pack<T>(s.x[1][0], s.x[1][1]),
        gpu::pack<T>(s.x[1][2], s.x[1][3])};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t value[4];
      gpu::load_matrices_transposed(value, value_row<kDim>(stage + Shared::kTile, lane, i * 16));
      gpu::multiply_add<T>(sums[2 * i], probabilities, value[0], value[1]);
      gpu::multiply_add<T>(sums[2 * i + 1], probabilities, value[2], value[3]);
    }
    gpu::sync_warp();  // all lanes have read the stage
    loader.load(stage);
    gpu::copy_commit();  // also after the last tile: groups are counted
    stage_index = stage_index + 1 == kStages ? 0 : stage_index + 1;
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += gpu::shuffle_xor(sum[i], 1);
    sum[i] += gpu::shuffle_xor(sum[i], 2);
  }
  gpu::copy_wait<0>();
  gpu::sync_block();  // no warp needs the pipeline any more

  float* const all_sums = reinterpret_cast<float*>(memory + Shared::kQueries);
  float* const all_stats = reinterpret_cast<float*>(memory + Shared::kQueries + Shared::kSums);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * kTileRows + lane / 4 + i * 8;
    if (lane % 4 == 0) {
      all_stats[row * 2] = maximum[i];
      all_stats[row * 2 + 1] = sum[i];
    }
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      float* to = all_sums + row * Shared::kSumsRow + j * 8 + lane % 4 * 2;
      to[0] = sums[j][2 * i];
      to[1] = sums[j][2 * i + 1];
    }
  }
  gpu::sync_block();

  // Eight threads a row.
  const int row = gpu::thread_index() / 8, column = gpu::thread_index() % 8 * 4;
  if (t.first_row + row >= t.rows) return;
  float peak = -gpu::kInfinity, total = 0.0f, weight[kDecodeWarps];
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) peak = gpu::greater(peak, all_stats[(w * kTileRows + row) * 2]);
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    const float* stats = all_stats + (w * kTileRows + row) * 2;
    weight[w] = stats[0] == -gpu::kInfinity ? 0.0f : gpu::exp2_fast(stats[0] - peak);
    total += weight[w] * stats[1];
  }
  const RowPlace at = place(p, t, t.first_row + row);
  const int64_t flat = (static_cast<int64_t>(at.request) * p.kv_heads * p.group + at.head) * p.query_len + at.position;
  const bool final = p.partial_out == nullptr;
  const int64_t slot = final ? flat : flat * (p.own_splits + p.shared_splits) + t.part;
  const float factor = final ? (total == 0.0f ? 0.0f : 1.0f / total) : 1.0f;
  if (column == 0) {
    if (final) {
      p.lse[slot] = total == 0.0f ? -gpu::kInfinity : (peak + gpu::log2_precise(total)) * kLn2;
    } else {
      p.partial_stats[slot * 2] = peak;
      p.partial_stats[slot * 2 + 1] = total;
    }
  }
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    Four found = {};
    float(&x)[4] = found.x;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float* from = all_sums + (w * kTileRows + row) * Shared::kSumsRow + i * 32 + column;
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] += weight[w] * from[j];
    }
    const int64_t to = slot * kDim + i * 32 + column;
    if (final) {
      uint32_t* out = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + to);
      out[0] = gpu::pack<T>(x[0] * factor, x[1] * factor);
      out[1] = gpu::pack<T>(x[2] * factor, x[3] * factor);
    } else {
      *reinterpret_cast<Four*>(p.partial_out + to) = found;
    }
  }
}

// Joins the partial results of one row, in fp32 and in a fixed order.
template <class T, int kDim>
KVC_KERNEL(kDecodeThreads, 1)
decode_merge(KVC_PARAMETERS(DecodeMerge) p) {
  using namespace decode;
  constexpr int kColumns = kDim / 32;  // of one lane
  constexpr int kAtOnce = 4;
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t row = gpu::block_index();
  const float* const stats = p.partial_stats + row * p.parts * 2;
  const float* const partial = p.partial_out + row * p.parts * kDim;
  float* const all_sums = reinterpret_cast<float*>(gpu::shared_memory());

  float peak = -gpu::kInfinity, total = 0.0f;
  for (int32_t i = lane; i < p.parts; i += 32) peak = gpu::greater(peak, stats[i * 2]);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) peak = gpu::greater(peak, gpu::shuffle_xor(peak, mask));
  const float reference = peak == -gpu::kInfinity ? 0.0f : peak;
  for (int32_t i = lane; i < p.parts; i += 32) total += gpu::exp2_fast(stats[i * 2] - reference) * stats[i * 2 + 1];
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) total += gpu::shuffle_xor(total, mask);

  float sums[kColumns] = {};
  for (int32_t first = warp; first < p.parts; first += kDecodeWarps * kAtOnce) {
    float x[kAtOnce][kColumns], weight[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t part = first + i * kDecodeWarps;
      weight[i] = part < p.parts ? gpu::exp2_fast(stats[part * 2] - reference) : 0.0f;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[i][j] = part < p.parts ? partial[part * int64_t{kDim} + j * 32 + lane] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[j] += weight[i] * x[i][j];
    }
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) all_sums[warp * kDim + j * 32 + lane] = sums[j];
  gpu::sync_block();

  if (gpu::thread_index() == 0) {
    p.lse[row] = total == 0.0f ? -gpu::kInfinity : (peak + gpu::log2_precise(total)) * kLn2;
  }
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int column = gpu::thread_index() * 2; column < kDim; column += kDecodeThreads * 2) {
    float x[2] = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      x[0] += all_sums[w * kDim + column];
      x[1] += all_sums[w * kDim + column + 1];
    }
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * kDim + column) = gpu::pack<T>(x[0] * factor, x[1] * factor);
  }
}

template <int kDim>
constexpr int kDecodeMergeShared = kDecodeWarps * kDim * 4;

}  // namespace kvc
