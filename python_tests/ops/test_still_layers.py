# SPDX-License-Identifier: Apache-2.0
"""Several layers of STILL in one call are those layers one by one: results, gradients, groups, bad input."""

import pytest
import torch

from kvcompact_kernels import BackendUnavailableError
from kvcompact_kernels.ops import still_compaction as module_op
from kvcompact_kernels.ops import still_compaction_chunked, still_cross_attention
from kvcompact_kernels.ops.still_compaction import LATENT_BYTES, LATENT_TENSORS, _layers_at_once
from kvcompact_kernels.rope import Rope
from kvcompact_kernels.still_config import StillConfig, init_still_parameters

FP64 = torch.float64
OPTIONS = {
    "default": {},
    "one block, no beta": {"num_blocks": 1, "self_attention": False, "use_beta": False},
    "sink, feed-forward": {"sink": 2, "ffn": True},
    "latents per head, no norm": {"latents_per_head": True, "num_kv_heads": 3, "qk_norm": False},
}


def make(count=3, batch=2, tokens=22, dtype=FP64, **options):
    config = StillConfig(slots=5, head_dim=8, **options)
    params = [init_still_parameters(config, dtype=dtype) for _ in range(count)]
    params = [{name: x + 0.1 * torch.randn_like(x) for name, x in p.items()} for p in params]
    keys, values = ([torch.randn(batch, 3, tokens, 8, dtype=FP64).to(dtype) for _ in range(count)] for _ in "kv")
    keys[-1] = keys[-1].transpose(1, 2).contiguous().transpose(1, 2)
    return keys, values, params, config, Rope(Rope.default(8).inv_freq, attention_scaling=1.25)


def assert_same(got, wanted):
    assert isinstance(got, list) and len(got) == len(wanted)
    for block, want in zip(got, wanted):
        for x, y in zip(block, want):
            assert (x is None) == (y is None)
            if y is not None:
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_layers_equal_single_ones(name, backend):
    keys, values, params, *rest = make(**OPTIONS[name])
    positions = torch.arange(22).mul(3).add(7)
    got = module_op(keys, tuple(values), params, *rest, positions, backend=backend)
    layers = list(zip(keys, values, params))
    assert_same(got, [module_op(*layer, *rest, positions, backend=backend) for layer in layers])
    assert_same(module_op(keys[:1], values[:1], params[:1], *rest, backend=backend), [module_op(*layers[0], *rest)])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_of_layers_equal_single_ones(name, backend):
    keys, values, params, *rest = make(**OPTIONS[name])
    got = still_compaction_chunked(keys, values, params, *rest, 11, 40, backend=backend)
    layers = zip(keys, values, params)
    assert_same(got, [still_compaction_chunked(*layer, *rest, 11, 40, backend=backend) for layer in layers])


@pytest.mark.parametrize("chunk", [None, 11])
def test_gradients_reach_every_layer(chunk):
    keys, values, params, *rest = make(count=2, sink=1, num_blocks=2)
    leaves = [*keys, *values, *(x for p in params for x in p.values())]
    for leaf in leaves:
        leaf.requires_grad_()

    def compacted(*layers):
        if chunk is None:
            return module_op(*layers, *rest, backend="torch")
        return still_compaction_chunked(*layers, *rest, chunk, backend="torch")

    blocks = compacted(keys, values, params)
    weights = [[torch.randn_like(x) for x in block] for block in blocks]

    def gradients(blocks):
        return torch.autograd.grad(sum((x * w).sum() for b, ws in zip(blocks, weights) for x, w in zip(b, ws)), leaves)

    for got, want in zip(gradients(blocks), gradients([compacted(*layer) for layer in zip(keys, values, params)])):
        torch.testing.assert_close(got, want)


def cross_arguments(count=3):
    shapes = ((1, 3, 5, 20), (2, 3, 7, 8), (2, 3, 7, 8), (20, 16), (20,), (20,))
    lists = [[torch.randn(shape, dtype=FP64) for _ in range(count)] for shape in shapes]
    angle, int_angle = torch.randn(7, 4, dtype=FP64), torch.randn(7, 10, dtype=FP64)
    return lists, {"cos": angle.cos(), "sin": angle.sin(), "int_cos": int_angle.cos(), "int_sin": int_angle.sin()}


@pytest.mark.parametrize("vectors", [True, False])
def test_cross_attention_of_lists(vectors):
    lists, tables = cross_arguments()
    lists = lists if vectors else [*lists[:4], None, None]
    pooled, lse = still_cross_attention(*lists, **tables, return_lse=True)
    alone = still_cross_attention(*lists, **tables)
    assert [len(x) for x in (pooled, lse, alone)] == [3, 3, 3]
    for i in range(3):
        layer = [None if x is None else x[i] for x in lists]
        wanted = still_cross_attention(*layer, **tables, return_lse=True)
        for got, want in zip((pooled[i], lse[i], alone[i]), (*wanted, wanted[0])):
            torch.testing.assert_close(got, want)


def test_the_first_groups_of_layers_are_the_largest():
    """Qwen3-4B, 8k to 1k: many layers at once where memory waits for slots that are still to come, one at the end."""
    config = StillConfig(slots=1024, head_dim=128)
    params = {"latents": torch.empty(1024, 256, dtype=torch.bfloat16)}
    keys = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16)
    groups = _layers_at_once(36, 8, config, params, keys)
    sizes = [part.stop - part.start for part in groups]
    assert [i for part in groups for i in range(part.start, part.stop)] == list(range(36))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] >= 4 and sizes[-1] == 1 and len(sizes) <= 20
    latents, left = 8 * 1024 * 256 * 2, 36
    for size in sizes:  # a bounded amount beyond what the slots of the layers that are left will take
        assert size == 1 or (LATENT_TENSORS * size - left) * latents <= LATENT_BYTES
        left -= size
    assert LATENT_BYTES <= 0.05 * 36 * 2 * 8 * 8192 * 128 * 2
    small = StillConfig(slots=64, head_dim=64)
    params = {"latents": torch.empty(64, 128)}
    assert _layers_at_once(30, 3, small, params, keys) == [slice(0, 30)]


def test_bad_lists():
    keys, values, params, *rest = make()
    for function, more in ((module_op, ()), (still_compaction_chunked, (11,))):
        with pytest.raises(ValueError, match="keys must hold at least one layer"):
            function([], [], [], *rest, *more)
        with pytest.raises(ValueError, match="params must hold 3 layers, as keys does, got 2"):
            function(keys, values, params[:2], *rest, *more)
        with pytest.raises(TypeError, match="params must be a list with an entry a layer"):
            function(keys, values, params[0], *rest, *more)
        with pytest.raises(ValueError, match=r"values\[1\] must have shape"):
            function(keys, [values[0], values[1][:1], values[2]], params, *rest, *more)
        with pytest.raises(ValueError, match=r"keys\[2\] must have shape"):
            function([*keys[:2], keys[2][:1]], [*values[:2], values[2][:1]], params, *rest, *more)
        with pytest.raises(ValueError, match=r"params\[1\] does not fit config: missing \['latents'\]"):
            function(
                keys,
                values,
                [params[0], {k: v for k, v in params[1].items() if k != "latents"}, params[2]],
                *rest,
                *more,
            )
        with pytest.raises(BackendUnavailableError, match="cuda|CUDA|GPU|Triton|float"):
            function(keys, values, params, *rest, *more, backend="triton")
    lists, tables = cross_arguments()
    with pytest.raises(ValueError, match=r"query\[1\] must have shape \[1, 3, 5, 20\]"):
        still_cross_attention([lists[0][0], lists[0][1][:, :1], lists[0][2]], *lists[1:], **tables)
    with pytest.raises(TypeError, match=r"key_norm\[2\] must be a torch.Tensor"):
        still_cross_attention(*lists[:5], [*lists[5][:2], None], **tables)
    with pytest.raises(TypeError, match="keys must be a tensor, or a list"):
        still_cross_attention(lists[0][0], None, lists[2][0], lists[3][0], **tables)
