# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel that reads and does nothing else: the denominator of every share of a GPU's bandwidth."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps", "programs"])
def read_only(X, Out, steps, programs, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Program p combines blocks ``p, p + programs, ...`` of int32 ``X``, ``steps * AHEAD`` of them, AHEAD in flight at once."""
    lanes = tl.arange(0, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(steps):
        for _ in tl.static_range(AHEAD):
            total ^= tl.load(X + block * BLOCK + lanes)
            block += programs
    tl.store(Out + tl.program_id(0), tl.xor_sum(total, 0))
