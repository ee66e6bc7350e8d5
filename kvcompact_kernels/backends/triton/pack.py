# SPDX-License-Identifier: Apache-2.0
"""Packing on the GPU: keys and values of all layers in one launch, bound by the bytes that it moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import runtime

ROWS = 32


def supports(keys: Tensor, values: Tensor, indices: Tensor) -> str | None:
    """None when the kernel runs these normalised arguments, else the reason why it does not."""
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        return "has no backward pass, and keys or values need a gradient"
    return runtime.problem(keys, values)


declines = runtime.declines_cpu


def run(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Packed keys and values ``[B, Hkv, t, d]``."""
    return run_layers([(keys, values, indices)])[0]


def run_layers(layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same for layers that agree in all but their tokens and slots: one launch, results in memory of their own each."""
    from .kernels import pack as kernels

    if torch.compiler.is_compiling() and len(layers) > 1:  # there are no addresses yet
        return [run(*layer) for layer in layers]
    first = layers[0][0]
    batch, kv_heads, _, head_dim = first.shape
    like = {"dtype": first.dtype, "device": first.device}
    shapes = [(batch, kv_heads, indices.shape[-1], head_dim) for _, _, indices in layers]
    packed = [(torch.empty(shape, **like), torch.empty(shape, **like)) for shape in shapes]
    todo = [(*layer, *outputs) for layer, outputs in zip(layers, packed) if outputs[0].numel()]
    if not todo:
        return packed
    sizes = [_sizes(*layer[:3]) for layer in todo]
    many, aligned, table = len(todo) > 1, False, todo[0][2]
    if many:
        addresses = [[x.data_ptr() for x in layer] for layer in todo]
        aligned = all(runtime.aligned((*a[:2], *a[3:]), s[:6]) for a, s in zip(addresses, sizes))
        table = runtime.device_table([a + s for a, s in zip(addresses, sizes)], first.device)
    tiles = -(-max(s[-1] for s in sizes) // ROWS)
    with runtime.on_device(first):
        kernels.pack_slots[(len(todo) * batch * kv_heads * tiles,)](
            *todo[0],
            table,
            *([0] * 11 if many else sizes[0]),
            kv_heads,
            batch * kv_heads,
            tiles,
            HEAD_DIM=head_dim,
            D=runtime.padded_dim(head_dim),
            BM=ROWS,
            LAYERS=many,
            ALIGNED=aligned,
            num_warps=4,
        )
    return packed


def _sizes(keys: Tensor, values: Tensor, indices: Tensor) -> list[int]:
    """A layer's strides, tokens and slots, as the kernel takes them."""
    strides = [0, 0, indices.stride(0)] if indices.ndim == 1 else [*runtime.strides(indices, 2), indices.stride(2)]
    tensors = (*runtime.strides(keys, 3), *runtime.strides(values, 3))
    return [*tensors, *strides, keys.shape[2], indices.shape[-1]]
