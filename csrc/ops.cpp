// SPDX-License-Identifier: Apache-2.0
// Every op schema of the namespace `kvcompact`, and nothing else. Implementations register themselves:
// csrc/<op>/cpu.cpp for the CPU, csrc/<op>/*.cu for CUDA, kvcompact_kernels/ops/<op>.py for fake tensors and autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kvcompact, m) {
  // Attention over compact blocks (with a per-slot bias) and an ordinary tail. See kvcompact_kernels/ops/compact_attention.py.
  m.def(
      "compact_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] betas, Tensor?[] offsets, "
      "Tensor? tail_keys, Tensor? tail_values, Tensor? tail_mask, "
      "float scale, bool causal, int window, int num_kv_heads) -> (Tensor out, Tensor lse)");
  // The same for short queries, on a GPU, in `splits` pieces (0: as many as fill it); bytes of shared memory that a block of
  // it needs; the machine code and PTX that it was built to ("sm_80+compute_80"). See kvcompact_kernels/backends/cuda/compact_attention.py.
  m.def(
      "compact_attention_decode(Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] betas, Tensor?[] offsets, "
      "Tensor? tail_keys, Tensor? tail_values, Tensor? tail_mask, "
      "float scale, bool causal, int window, int num_kv_heads, int splits=0) -> (Tensor out, Tensor lse)");
  m.def("compact_attention_decode_shared_bytes(int head_dim) -> int");
  m.def("compact_attention_decode_code() -> str");
  // Column sums or maxima of the softmax of the last queries over all keys. See kvcompact_kernels/ops/key_scores.py.
  m.def(
      "key_scores(Tensor query, Tensor keys, Tensor? lse, float scale, bool causal, str reduce) -> Tensor");
  // STILL's cross-attention of latents over un-rotated keys and values. See kvcompact_kernels/ops/still_compaction.py.
  m.def(
      "still_cross_attention(Tensor query, Tensor keys, Tensor values, Tensor key_weight, Tensor? key_bias, "
      "Tensor? key_norm, Tensor cos, Tensor sin, Tensor int_cos, Tensor int_sin, float scale, float norm_eps) "
      "-> (Tensor pooled, Tensor lse)");
  // Reads every byte once and returns their exclusive or, as 32-bit words: the read bandwidth that benchmarks compare with.
  m.def("read_probe(Tensor data) -> int");
  // The instruction set that the CPU kernels run with now, and all that this build and this machine have (comma-joined).
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  // Caps the instruction set for this process ("" = no cap); for tests and benchmarks.
  m.def("set_cpu_isa(str isa) -> ()");
}
