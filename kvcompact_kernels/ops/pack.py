# SPDX-License-Identifier: Apache-2.0
"""``pack_slots``: kept tokens of the layers' caches, gathered into blocks of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_layers, check_tensor
from ..backends import registry
from ..backends.torch import pack as plain
from ..backends.triton import pack as triton


def pack_slots(
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    *,
    release: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Keys and values of the kept tokens, in memory of their own, so that the cache can be freed.

    Takes one layer, or lists with an entry a layer: one launch on a GPU packs keys and values of all heads of all requests
    of all layers. (A model that compacts a context while it reads it has one layer at a time: right after the layer's
    attention has run its cache becomes slots and is freed, and no other layer's is there.)

    Args:
        keys, values: ``[B, Hkv, T, d]``, floating, of one dtype, or lists of such. Strides are honoured. Layers agree in B,
            Hkv, d, dtype and device; T and t may differ.
        indices: int64 ``[B, Hkv, t]``, or ``[t]`` for the same tokens in every head; in ``[0, T)``; or a list of such. The
            values are not looked at before the launch, for that would wait for the GPU: an index outside of the range gives
            a slot of NaN from the kernel and an error from PyTorch.
        release: with lists: leave ``keys`` and ``values`` empty, so that the old memory is free as soon as the caller holds
            no other reference to it. They stay as they are when an error is raised.
        backend: ``"auto"``, or a backend's name, which then runs or raises.

    Returns:
        ``(keys, values)``, contiguous ``[B, Hkv, t, d]``, or two lists of such, each tensor in memory of its own.
        Differentiable by the backend ``"torch"``, which ``"auto"`` takes when keys or values need a gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape, an empty list, lists of different
            lengths.
        BackendUnavailableError: the named backend cannot run this call.

    Example::

        packed_keys, packed_values = pack_slots(keys, values, kept, release=True)  # three lists, an entry a layer
        assert keys == [] and values == []
    """
    if isinstance(keys, Tensor):
        if release:
            raise ValueError("release=True needs lists, one entry a layer: whoever calls holds a single tensor")
        args = _normalise(keys, values, indices)
        return registry.select("pack_slots", backend, args).run(*args)
    if release:
        for name, value in (("keys", keys), ("values", values)):
            if not isinstance(value, list):
                raise TypeError(f"{name} must be a list for release=True to empty it, got {type(value).__name__}")
    count = check_layers(keys=keys, values=values, indices=indices)
    layers = [_normalise(keys[i], values[i], indices[i], f"[{i}]") for i in range(count)]
    for i, (layer, _, _) in enumerate(layers):
        batch, heads, _, head_dim = keys[0].shape
        check_tensor(
            f"keys[{i}]", layer, shape=(batch, heads, None, head_dim), dtypes=(keys[0].dtype,), device=keys[0].device
        )
    chosen = registry.select_for_layers("pack_slots", backend, layers)
    packed = chosen.run_layers(layers) if chosen.run_layers else [chosen.run(*layer) for layer in layers]
    if release:
        keys.clear()
        values.clear()
    return [k for k, _ in packed], [v for _, v in packed]


def _normalise(keys, values, indices, which: str = "") -> tuple[Tensor, Tensor, Tensor]:
    check_tensor(f"keys{which}", keys, ndim=4)
    if not keys.is_floating_point():
        raise TypeError(f"keys{which} must be floating, got {keys.dtype}")
    check_tensor(f"values{which}", values, shape=tuple(keys.shape), dtypes=(keys.dtype,), device=keys.device)
    check_tensor(f"indices{which}", indices, dtypes=(torch.int64,), device=keys.device)
    if indices.ndim != 1 and tuple(indices.shape[:-1]) != tuple(keys.shape[:2]):
        raise ValueError(f"indices{which} must have shape [t] or {[*keys.shape[:2], 't']}, got {list(indices.shape)}")
    return keys, values, indices


registry.register(
    "pack_slots",
    _normalise,
    [
        registry.Backend("triton", triton.supports, triton.run, declines=triton.declines, run_layers=triton.run_layers),
        registry.Backend("torch", plain.supports, plain.run),
    ],
)
