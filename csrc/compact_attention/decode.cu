// SPDX-License-Identifier: Apache-2.0
// Host side of kvcompact::compact_attention_decode: checks, the plan (how many splits), one or two launches.
// Nothing waits for the device, and nothing is allocated but the outputs and one workspace.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/gpu_host.h"
#include "compact_attention/decode.cuh"

namespace {

using kvc::Decode;
using kvc::DecodeMerge;
using kvc::DecodeSegment;
using kvc::Gpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

// Slots of a full head over the mean, where heads hold unequal numbers: only the device knows the fullest.
constexpr int64_t kUneven = 4;
// Two tiles of 16 keys a warp: all copies of a shorter block are in flight at once, so splitting it further gains nothing.
constexpr int64_t kLeastKeysPerSplit = 2 * kvc::kDecodeWarps * kvc::kTileKeys;
constexpr int64_t kMostSplits = 128;
constexpr int64_t kMostKeys = (int64_t{1} << 31) - 64;
constexpr int64_t kMostRows = (int64_t{1} << 31) - 64;

void check(const Tensor& x, const Tensor& query, const std::string& name, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(
      Gpu::holds(x) && x.get_device_index() == query.get_device_index() && x.scalar_type() == query.scalar_type(),
      "compact_attention_decode: ", name, " must have query's device and dtype");
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || x.size(i) == sizes[i];
  STD_TORCH_CHECK(fits, "compact_attention_decode: ", name, " has a wrong shape");
  bool aligned = x.numel() == 0 || (x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) aligned = aligned && (x.size(i) <= 1 || x.stride(i) % 8 == 0);
  STD_TORCH_CHECK(
      aligned, "compact_attention_decode: ", name, " must be contiguous in its last dimension, with rows on 16 bytes");
}

void check_plain(
    const Tensor& x, const Tensor& query, const std::string& name, ScalarType dtype, const std::vector<int64_t>& sizes) {
  bool fits = Gpu::holds(x) && x.get_device_index() == query.get_device_index() && x.scalar_type() == dtype &&
              x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x.size(i) == sizes[i];
  STD_TORCH_CHECK(fits, "compact_attention_decode: ", name, " has a wrong device, dtype or shape");
}

// A dimension of one entry may have any stride.
int64_t step(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

struct Block {
  DecodeSegment segment;
  int64_t planned_keys;  // of a full head, for the number of splits
  int64_t most_keys;
  bool shared;
};

Block make_block(
    const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& beta,
    const std::optional<Tensor>& offsets, int64_t kv_heads, const std::string& index) {
  const int64_t batch = query.size(0), head_dim = query.size(3);
  Block block = {};
  DecodeSegment& s = block.segment;
  int64_t block_batch = 0;
  if (offsets) {
    check(keys, query, "keys" + index, {-1, head_dim});
    check(values, query, "values" + index, {keys.size(0), head_dim});
    check_plain(*offsets, query, "offsets" + index, ScalarType::Long, {offsets->size(0)});
    block_batch = (offsets->size(0) - 1) / kv_heads;
    STD_TORCH_CHECK(
        offsets->size(0) == block_batch * kv_heads + 1, "compact_attention_decode: offsets", index,
        " must have one entry per request and KV head, and one more");
    if (beta) check_plain(*beta, query, "betas" + index, ScalarType::Float, {keys.size(0)});
    s.offsets = static_cast<const int64_t*>(offsets->const_data_ptr());
    s.offset_stride = offsets->stride(0);
    s.key_strides[2] = keys.stride(0);
    s.value_strides[2] = values.stride(0);
    s.beta_strides[2] = beta ? beta->stride(0) : 0;
    const int64_t mean = (keys.size(0) + offsets->size(0) - 2) / std::max<int64_t>(offsets->size(0) - 1, 1);
    block.planned_keys = mean * std::min(kUneven, kv_heads);
  } else {
    check(keys, query, "keys" + index, {-1, kv_heads, -1, head_dim});
    check(values, query, "values" + index, {keys.size(0), kv_heads, keys.size(2), head_dim});
    block_batch = keys.size(0);
    if (beta) check_plain(*beta, query, "betas" + index, ScalarType::Float, {block_batch, kv_heads, keys.size(2)});
    for (int i = 0; i < 3; ++i) {
      s.key_strides[i] = step(keys, i);
      s.value_strides[i] = step(values, i);
      s.beta_strides[i] = beta ? step(*beta, i) : 0;
    }
    s.length = static_cast<int32_t>(keys.size(2));
    block.planned_keys = keys.size(2);
  }
  STD_TORCH_CHECK(
      block_batch == batch || block_batch == 1, "compact_attention_decode: keys", index, " must have batch size 1 or ",
      batch, ", got ", block_batch);
  block.most_keys = keys.size(offsets ? 0 : 2);
  s.keys = keys.const_data_ptr();
  s.values = values.const_data_ptr();
  s.beta = beta ? static_cast<const float*>(beta->const_data_ptr()) : nullptr;
  block.shared = block_batch == 1 && batch > 1;
  return block;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many splits as fill the device once.
int32_t plan_splits(int64_t room, int64_t blocks_of_one_split, int64_t keys, int64_t wanted) {
  if (wanted > 0) return static_cast<int32_t>(wanted);
  const int64_t most = std::min(keys / kLeastKeysPerSplit, kMostSplits);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(most, room / std::max<int64_t>(blocks_of_one_split, 1))));
}

template <class T, int kDim>
void launch(const Gpu& gpu, const Decode& params, int64_t rows) {
  const int64_t blocks =
      int64_t{params.kv_heads} * (int64_t{params.shared_splits} * params.shared_tiles +
                                  int64_t{params.batch} * params.own_splits * params.own_tiles);
  gpu.launch(
      kvc::decode_attention<T, kDim>, blocks, kvc::kDecodeThreads, kvc::DecodeShared<kDim>::kBytes, params);
  if (params.partial_out == nullptr) return;
  const DecodeMerge merge = {
      params.partial_out, params.partial_stats, params.out, params.lse, params.own_splits + params.shared_splits};
  gpu.launch(kvc::decode_merge<T, kDim>, rows, kvc::kDecodeThreads, kvc::kDecodeMergeShared<kDim>, merge);
}

template <class T>
void launch(const Gpu& gpu, const Decode& params, int64_t rows, int64_t head_dim) {
  switch (head_dim) {
    case 64: return launch<T, 64>(gpu, params, rows);
    case 96: return launch<T, 96>(gpu, params, rows);
    case 128: return launch<T, 128>(gpu, params, rows);
    case 256: return launch<T, 256>(gpu, params, rows);
    default: STD_TORCH_CHECK(false, "compact_attention_decode: head_dim must be 64, 96, 128 or 256, got ", head_dim);
  }
}

// Blocks on a multiprocessor: registers allow the kernel's kDecodeResidency, some GPUs' shared memory fewer.
template <int kDim>
int64_t resident_blocks(const Gpu& gpu) {
  const int64_t fitting = gpu.resident_blocks(kvc::DecodeShared<kDim>::kBytes);
  return std::max<int64_t>(1, std::min<int64_t>(kvc::kDecodeResidency<kDim>, fitting));
}

int64_t resident_blocks(const Gpu& gpu, int64_t head_dim) {
  switch (head_dim) {
    case 64: return resident_blocks<64>(gpu);
    case 96: return resident_blocks<96>(gpu);
    case 128: return resident_blocks<128>(gpu);
    default: return resident_blocks<256>(gpu);
  }
}

// `splits`: of each kind of keys, 0 for the plan's choice.
std::tuple<Tensor, Tensor> compact_attention_decode(
    Tensor query, Tensors keys, Tensors values, OptionalTensors betas, OptionalTensors offsets,
    std::optional<Tensor> tail_keys, std::optional<Tensor> tail_values, std::optional<Tensor> tail_mask, double scale,
    bool causal, int64_t window, int64_t num_kv_heads, int64_t splits) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(
      Gpu::holds(query) && query.dim() == 4 && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
      "compact_attention_decode: query must be [B, H, Lq, d] in bfloat16 or float16 on the GPU");
  const int64_t batch = query.size(0), heads = query.size(1), query_len = query.size(2), head_dim = query.size(3);
  check(query, query, "query", {-1, -1, -1, -1});
  STD_TORCH_CHECK(
      num_kv_heads > 0 && heads % num_kv_heads == 0, "compact_attention_decode: query's ", heads,
      " heads are not a multiple of num_kv_heads, ", num_kv_heads);
  STD_TORCH_CHECK(
      values.size() == keys.size() && betas.size() == keys.size() && offsets.size() == keys.size(),
      "compact_attention_decode: keys, values, betas and offsets must have one entry per block");
  STD_TORCH_CHECK(
      keys.size() <= kvc::kMaxDecodeBlocks, "compact_attention_decode: at most ", kvc::kMaxDecodeBlocks,
      " blocks, got ", keys.size());
  STD_TORCH_CHECK(
      tail_keys.has_value() == tail_values.has_value(),
      "compact_attention_decode: tail_keys and tail_values go together");
  STD_TORCH_CHECK(splits >= 0, "compact_attention_decode: splits must not be negative");
  const int64_t rows = batch * heads * query_len;
  STD_TORCH_CHECK(rows <= kMostRows, "compact_attention_decode: query has too many rows");
  std::vector<Block> blocks;
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    blocks.push_back(make_block(query, keys[i], values[i], betas[i], offsets[i], num_kv_heads, index));
  }
  const int64_t tail_length = tail_keys ? tail_keys->size(2) : 0;
  int64_t most_keys = tail_length + query_len;
  for (const Block& block : blocks) most_keys += block.most_keys;
  STD_TORCH_CHECK(most_keys <= kMostKeys, "compact_attention_decode: there are too many keys, ", most_keys);
  if (tail_keys) {
    check(*tail_keys, query, "tail_keys", {batch, num_kv_heads, -1, head_dim});
    check(*tail_values, query, "tail_values", {batch, num_kv_heads, tail_length, head_dim});
    if (tail_mask) check_plain(*tail_mask, query, "tail_mask", ScalarType::Bool, {batch, tail_length});
  }

  Tensor out = torch::stable::new_empty(query, {batch, heads, query_len, head_dim});
  Tensor lse = torch::stable::new_empty(query, {batch, heads, query_len}, ScalarType::Float);
  if (rows == 0) return {out, lse};
  const Gpu gpu(query);

  Decode p = {};
  int64_t own_keys = tail_length, shared_keys = 0;
  for (const Block& block : blocks) {
    if (!block.shared) p.segments[p.own_segments++] = block.segment, own_keys += block.planned_keys;
  }
  p.has_tail = tail_length > 0;
  if (p.has_tail) {
    DecodeSegment& s = p.segments[p.own_segments++];
    s.keys = tail_keys->const_data_ptr();
    s.values = tail_values->const_data_ptr();
    for (int i = 0; i < 3; ++i) {
      s.key_strides[i] = step(*tail_keys, i);
      s.value_strides[i] = step(*tail_values, i);
    }
    s.length = static_cast<int32_t>(tail_length);
    if (tail_mask) {
      p.tail_mask = static_cast<const uint8_t*>(tail_mask->const_data_ptr());
      for (int i = 0; i < 2; ++i) p.mask_strides[i] = step(*tail_mask, i);
    }
  }
  for (const Block& block : blocks) {
    if (block.shared) {
      p.segments[p.own_segments + p.shared_segments++] = block.segment;
      shared_keys += block.planned_keys;
    }
  }
  p.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.query_strides[i] = step(query, i);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.scale_log2 = static_cast<float>(scale) * kvc::decode::kLog2E;
  p.batch = static_cast<int32_t>(batch);
  p.kv_heads = static_cast<int32_t>(num_kv_heads);
  p.group = static_cast<int32_t>(heads / num_kv_heads);
  p.query_len = static_cast<int32_t>(query_len);
  p.tail_length = static_cast<int32_t>(tail_length);
  // One that reaches past both ends hides nothing.
  p.window = window < 0 || window >= tail_length + query_len ? -1 : static_cast<int32_t>(window);
  p.causal = causal;
  const int64_t head_rows = heads / num_kv_heads * query_len;
  p.own_tiles = static_cast<int32_t>(ceil_div(head_rows, kvc::kTileRows));
  p.shared_tiles = static_cast<int32_t>(ceil_div(head_rows * batch, kvc::kTileRows));
  const int64_t room = resident_blocks(gpu, head_dim) * gpu.multiprocessors();
  if (p.shared_segments > 0) {
    p.shared_splits = plan_splits(room, num_kv_heads * p.shared_tiles, shared_keys, splits);
  }
  if (p.own_segments > 0 || p.shared_segments == 0) {  // without any key the outputs still have to be written
    p.own_splits = plan_splits(room, batch * num_kv_heads * p.own_tiles, own_keys, splits);
  }
  const int64_t parts = int64_t{p.own_splits} + p.shared_splits;
  std::optional<Tensor> workspace;
  if (parts > 1) {
    workspace = torch::stable::new_empty(query, {rows * parts * (head_dim + 2)}, ScalarType::Float);
    p.partial_out = static_cast<float*>(workspace->mutable_data_ptr());
    p.partial_stats = p.partial_out + rows * parts * head_dim;
  }
  if (dtype == ScalarType::BFloat16) {
    launch<kvc::Bf16>(gpu, p, rows, head_dim);
  } else {
    launch<kvc::Fp16>(gpu, p, rows, head_dim);
  }
  return {out, lse};
}

int64_t compact_attention_decode_shared_bytes(int64_t head_dim) {
  switch (head_dim) {
    case 64: return kvc::DecodeShared<64>::kBytes;
    case 96: return kvc::DecodeShared<96>::kBytes;
    case 128: return kvc::DecodeShared<128>::kBytes;
    case 256: return kvc::DecodeShared<256>::kBytes;
    default: return -1;
  }
}

std::string compact_attention_decode_code() { return kvc::cuda_code(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kvcompact, KVC_GPU_DISPATCH_KEY, m) {
  m.impl("compact_attention_decode", TORCH_BOX(&compact_attention_decode));
}
STABLE_TORCH_LIBRARY_IMPL(kvcompact, CompositeExplicitAutograd, m) {
  m.impl("compact_attention_decode_shared_bytes", TORCH_BOX(&compact_attention_decode_shared_bytes));
  m.impl("compact_attention_decode_code", TORCH_BOX(&compact_attention_decode_code));
}
