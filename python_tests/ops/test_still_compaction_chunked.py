# SPDX-License-Identifier: Apache-2.0
"""Chunked compaction is compaction of every chunk; requests at different positions in one call of the cross-attention."""

import pytest
import torch

from kvcompact_kernels import BackendUnavailableError
from kvcompact_kernels.ops import still_compaction_chunked, still_cross_attention
from kvcompact_kernels.reference import still_compaction as reference
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters
from kvcompact_kernels.testing.budget import assert_within_budget
from kvcompact_kernels.testing.draws import draws

FP64 = torch.float64


def setup(dtype=FP64, batch=2, chunks=3, chunk=11, **options):
    config = StillConfig(slots=5, head_dim=8, **options)
    params = init_still_parameters(config, dtype=dtype)
    params = {name: p + 0.1 * torch.randn_like(p) for name, p in params.items()}
    rope = Rope.default(8)
    rope = Rope(rope.inv_freq, attention_scaling=1.25)
    keys, values = (torch.randn(batch, 3, chunks * chunk, 8, dtype=FP64).to(dtype) for _ in range(2))
    return keys, values, params, config, rope, chunk


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "options", [{}, {"sink": 2}, {"num_blocks": 1, "use_beta": False}, {"latents_per_head": True, "num_kv_heads": 3}]
)
def test_equals_the_definition_chunk_by_chunk(backend, options):
    args = setup(**options)
    for first in (0, 1000):
        for got, want in zip(
            still_compaction_chunked(*args, first, backend=backend), reference.still_compaction_chunked(*args, first)
        ):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want)


def test_one_chunk_and_transposed_memory():
    keys, values, *rest = setup(chunks=1)
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    for got, want in zip(
        still_compaction_chunked(keys, values, *rest, backend="torch"),
        reference.still_compaction_chunked(keys, values, *rest, 0),
    ):
        torch.testing.assert_close(got, want)


@draws(3)
def test_the_kernel_errs_no_more_than_torch():
    keys, values, params, *rest = setup(torch.float32)
    wide = {name: p.to(FP64) for name, p in params.items()}
    got = still_compaction_chunked(keys, values, params, *rest)
    naive = still_compaction_chunked(keys, values, params, *rest, backend="torch")
    truth = still_compaction_chunked(keys.to(FP64), values.to(FP64), wide, *rest, backend="torch")
    for x, y, z in zip(got, naive, truth):
        assert_within_budget(x, y, z)


def test_gradients():
    keys, values, params, *rest = setup(chunks=2, num_blocks=1)
    leaves = [keys, values, *params.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = [
        torch.randn(2, 3, 10, 8, dtype=FP64),
        torch.randn(2, 3, 10, 8, dtype=FP64),
        torch.randn(2, 3, 10, dtype=FP64),
    ]

    def gradients(outputs):
        return torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights)), leaves)

    got = gradients(still_compaction_chunked(keys, values, params, *rest, backend="torch"))
    for x, y in zip(got, gradients(reference.still_compaction_chunked(keys, values, params, *rest, 0))):
        torch.testing.assert_close(x, y)


def cross_arguments():
    angle = torch.randn(2, 7, 4, dtype=FP64)
    int_angle = torch.randn(7, 10, dtype=FP64)
    tensors = [torch.randn(*s, dtype=FP64) for s in ((2, 1, 3, 20), (2, 3, 7, 8), (2, 3, 7, 8), (20, 16), (20,), (20,))]
    tables = {"cos": angle.cos(), "sin": angle.sin(), "int_cos": int_angle.cos(), "int_sin": int_angle.sin()}
    return tensors, tables


def test_tables_of_each_request():
    tensors, tables = cross_arguments()
    got = still_cross_attention(*tensors, **tables)
    for i in range(2):
        own = [tensors[0][i : i + 1], tensors[1][i : i + 1], tensors[2][i : i + 1], *tensors[3:]]
        own_tables = {name: x[i] if x.ndim == 3 else x for name, x in tables.items()}
        torch.testing.assert_close(got[i : i + 1], still_cross_attention(*own, **own_tables))


def test_bad_input():
    args = setup(chunks=2)
    with pytest.raises(ValueError, match="multiple of chunk = 10"):
        still_compaction_chunked(*args[:5], 10)
    with pytest.raises(ValueError, match="first"):
        still_compaction_chunked(*args, -1)
    with pytest.raises(ValueError, match="fewer than the 5 slots"):
        still_compaction_chunked(*args[:5], 2)
    with pytest.raises(ValueError, match="values"):
        still_compaction_chunked(args[0], args[1][:, :, 1:], *args[2:])
    tensors, tables = cross_arguments()
    with pytest.raises(ValueError, match="cos and sin must have the same shape"):
        still_cross_attention(*tensors, **{**tables, "sin": tables["sin"][0]})
    with pytest.raises(ValueError, match=r"cos must have shape \[7, 4\] or \[2, 7, 4\]"):
        still_cross_attention(*tensors, **{**tables, "cos": tables["cos"][:1]})


def test_the_kernel_for_cpus_says_why_it_cannot():
    tensors, tables = cross_arguments()
    low = [x.float() for x in tensors]
    with pytest.raises(BackendUnavailableError, match="tables"):
        still_cross_attention(*low, **{name: x.float() for name, x in tables.items()}, backend="cpu")
