# SPDX-License-Identifier: Apache-2.0
"""The compacted cache: blocks of slots per layer, the number of tokens that they stand for, and a safe file format."""

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._checks import BadFileError, check_file, check_int, check_tensor
from .model_spec import fingerprint_differences
from .rope import Rope

FORMAT = "kvcompact-cache"
FORMAT_VERSION = 2  # 2 only where layers share slots: other files are written as 1, for older releases to read


@dataclass(frozen=True)
class CompactBlock:
    """Keys and values of one layer that every later query may attend to, with an optional bias per slot.

    Attributes:
        keys, values: ``[B, Hkv, t, d]``; or ``[N, d]`` with ``offsets`` when heads or batch elements hold unequal numbers
            of slots. Keys are already rotated. ``B = 1`` serves any batch.
        beta: None, or fp32 bias on each slot's logit (natural-log units): ``[B, Hkv, t]`` or ``[N]``.
        offsets: None, or int64 ``[B * Hkv + 1]``: rows ``offsets[i]:offsets[i + 1]`` belong to ``divmod(i, Hkv)``.
        num_kv_heads: Hkv.
    """

    keys: Tensor
    values: Tensor
    beta: Tensor | None = None
    offsets: Tensor | None = None
    num_kv_heads: int = 0

    def __post_init__(self):
        if self.offsets is None:
            check_tensor("keys", self.keys, ndim=4)
            object.__setattr__(self, "num_kv_heads", self.keys.shape[1])
            slots = tuple(self.keys.shape[:3])
        else:
            check_tensor("keys", self.keys, ndim=2)
            check_int("num_kv_heads", self.num_kv_heads, minimum=1)
            check_tensor("offsets", self.offsets, ndim=1, dtypes=(torch.int64,))
            if self.offsets.numel() < 2 or (self.offsets.numel() - 1) % self.num_kv_heads:
                raise ValueError(
                    f"offsets must have batch * {self.num_kv_heads} + 1 entries, got {self.offsets.numel()}"
                )
            if self.offsets[0] != 0 or self.offsets[-1] != self.keys.shape[0] or (self.offsets.diff() < 0).any():
                raise ValueError(f"offsets must ascend from 0 to the {self.keys.shape[0]} rows of keys")
            slots = (self.keys.shape[0],)
        check_tensor("values", self.values, shape=tuple(self.keys.shape), dtypes=(self.keys.dtype,))
        if self.beta is not None:
            wanted = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
            check_tensor("beta", self.beta, shape=slots, dtypes=(wanted,))

    @classmethod
    def pack(cls, heads: Sequence[Sequence[tuple[Tensor, Tensor, Tensor | None]]]) -> "CompactBlock":
        """A block from ``heads[b][h] = (keys [t_bh, d], values [t_bh, d], beta [t_bh] or None)``.

        Equal slot counts give the rectangular layout, unequal ones the packed layout, which holds no padding.
        """
        flat = [part for row in heads for part in row]
        batch, num_kv_heads = len(heads), len(heads[0])
        keys, values = torch.cat([k for k, _, _ in flat]), torch.cat([v for _, v, _ in flat])
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        beta = None
        if any(b is not None for _, _, b in flat):
            beta = torch.cat([keys.new_zeros(k.shape[0], dtype=dtype) if b is None else b for k, _, b in flat])
        counts = [k.shape[0] for k, _, _ in flat]
        if len(set(counts)) == 1:
            shape = (batch, num_kv_heads, counts[0])
            return cls(
                keys.reshape(*shape, -1), values.reshape(*shape, -1), None if beta is None else beta.reshape(shape)
            )
        offsets = torch.tensor([0, *counts], device=keys.device).cumsum(0)
        return cls(keys, values, beta, offsets, num_kv_heads)

    @classmethod
    def join_heads(cls, blocks: Sequence["CompactBlock"]) -> "CompactBlock":
        """One block from blocks of one KV head each, in order; packed where their numbers of slots differ."""
        rows = [block.heads() for block in blocks]
        return cls.pack([[row[b][0] for row in rows] for b in range(blocks[0].batch_size)])

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.offsets is None else (self.offsets.numel() - 1) // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.keys.shape[-1]

    @property
    def slot_counts(self) -> Tensor:
        """int64 ``[B, Hkv]``: slots of each batch element and KV head."""
        if self.offsets is None:
            return torch.full((self.batch_size, self.num_kv_heads), self.keys.shape[2])
        return self.offsets.diff().reshape(self.batch_size, self.num_kv_heads).cpu()

    @property
    def num_slots(self) -> int:
        """Slots of the fullest KV head."""
        return self.keys.shape[2] if self.offsets is None else int(self.slot_counts.max())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, bias and offsets included."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"keys": self.keys, "values": self.values, "beta": self.beta, "offsets": self.offsets}
        return {name: x for name, x in named.items() if x is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "CompactBlock":
        """The block on another device or with keys and values in another dtype; beta stays fp32 (fp64 for fp64 keys)."""
        keys, values = self.keys.to(device, dtype), self.values.to(device, dtype)
        beta = self.beta
        if beta is not None:
            beta = beta.to(device, torch.float64 if keys.dtype == torch.float64 else torch.float32)
        offsets = None if self.offsets is None else self.offsets.to(device)
        return replace(self, keys=keys, values=values, beta=beta, offsets=offsets)

    def plain(self) -> "CompactBlock":
        """The block with keys and values of its own: itself, unless it shares them with another layer."""
        return self

    def heads(self) -> list[list[tuple[Tensor, Tensor, Tensor | None]]]:
        """Views ``heads()[b][h] = (keys [t_bh, d], values [t_bh, d], beta [t_bh] or None)``; the inverse of :meth:`pack`."""
        rows = []
        for b in range(self.batch_size):
            row = []
            for h in range(self.num_kv_heads):
                if self.offsets is None:
                    where = (b, h)
                else:
                    i = b * self.num_kv_heads + h
                    where = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
                row.append((self.keys[where], self.values[where], None if self.beta is None else self.beta[where]))
            rows.append(row)
        return rows

    def index_batch(self, index: Tensor) -> "CompactBlock":
        """The block with batch elements ``index`` (repetitions allowed): beams, several sequences per request."""
        if self.offsets is None:
            # no index_select: on a GPU its gradient adds atomically, and those of repetitions differ from run to run
            tensors = {"keys": self.keys, "values": self.values, "beta": self.beta}
            return replace(self, **{n: x if x is None else x[index].contiguous() for n, x in tensors.items()})
        rows = self.heads()
        return CompactBlock.pack([rows[i] for i in index.tolist()])

    @staticmethod
    def cat(blocks: Sequence["CompactBlock"]) -> "CompactBlock":
        """The slots of all blocks, one after the other; a block with batch size 1 is repeated for larger ones."""
        if len(blocks) == 1:
            return blocks[0]
        batch = max(b.batch_size for b in blocks)
        for i, block in enumerate(blocks):
            if block.batch_size not in (1, batch):
                raise ValueError(f"blocks[{i}] must have batch size 1 or {batch}, got {block.batch_size}")
            if block.num_kv_heads != blocks[0].num_kv_heads or block.head_dim != blocks[0].head_dim:
                raise ValueError(
                    f"blocks[{i}] has {block.num_kv_heads} KV heads of dim {block.head_dim}, blocks[0] has "
                    f"{blocks[0].num_kv_heads} of dim {blocks[0].head_dim}"
                )
        if all(b.offsets is None for b in blocks):
            beta = None
            if any(b.beta is not None for b in blocks):
                wide = torch.float64 if blocks[0].keys.dtype == torch.float64 else torch.float32
                parts = [b.keys.new_zeros(b.keys.shape[:3], dtype=wide) if b.beta is None else b.beta for b in blocks]
                beta = torch.cat([p.expand(batch, -1, -1) for p in parts], 2)
            keys = torch.cat([b.keys.expand(batch, -1, -1, -1) for b in blocks], 2)
            return CompactBlock(keys, torch.cat([b.values.expand(batch, -1, -1, -1) for b in blocks], 2), beta)
        rows = [b.heads() if b.batch_size == batch else b.heads() * batch for b in blocks]
        merged = []
        for b in range(batch):
            merged.append([_cat_head([row[b][h] for row in rows]) for h in range(blocks[0].num_kv_heads)])
        return CompactBlock.pack(merged)


class SharedSlots:
    """Keys and values ``[B, Hkv, n, d]`` that the blocks of two layers hold together (see :class:`PairedBlock`)."""

    def __init__(self, keys: Tensor, values: Tensor):
        check_tensor("keys", keys, ndim=4)
        check_tensor("values", values, shape=tuple(keys.shape), dtypes=(keys.dtype,))
        self.keys, self.values = keys, values
        self._copy: tuple[Any, Callable[[], SharedSlots | None]] | None = None

    def __reduce__(self):
        return SharedSlots, (self.keys, self.values)

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> "SharedSlots":
        return self._once((device, dtype), lambda x: x.to(device, dtype))

    def index_batch(self, index: Tensor) -> "SharedSlots":
        return self._once(tuple(index.tolist()), lambda x: x.index_select(0, index))

    def _once(self, key: Any, change: Callable[[Tensor], Tensor]) -> "SharedSlots":
        """Both layers ask, one after the other, and get the same copy as long as one of them holds it."""
        known = self._copy[1]() if self._copy is not None and self._copy[0] == key else None
        if known is None:
            known = SharedSlots(change(self.keys), change(self.values))
            self._copy = (key, weakref.ref(known))
        return known


class PairedBlock(CompactBlock):
    """The block of one of two layers that hold one direction per slot together; each has the slots' lengths for itself.

    Stored are ``n`` shared rows: slots of the lower layer alone, then those of both, then slots of the upper layer alone. A
    layer has the first ``t`` or the last ``t`` of them, times a length each. ``keys`` and ``values`` are made anew whenever they
    are read, one layer's at a time, and nothing keeps them: that is the price at decode time. Equal slots in every head.

    Args:
        shared: what both layers hold; counted (and saved) with the lower one alone.
        key_norms, value_norms: fp32 (fp64 with fp64 slots) ``[B, Hkv, t]``, factors of the rows.
        upper: False for the lower of the two layers.
    """

    def __init__(self, shared: SharedSlots, key_norms: Tensor, value_norms: Tensor, upper: bool):
        if not isinstance(shared, SharedSlots):
            raise TypeError(f"shared must be SharedSlots, got {type(shared).__name__}")
        batch, num_kv_heads, rows, _ = shared.keys.shape
        wide = torch.float64 if shared.keys.dtype == torch.float64 else torch.float32
        check_tensor("key_norms", key_norms, ndim=3, dtypes=(wide,))
        if key_norms.shape[:2] != (batch, num_kv_heads) or key_norms.shape[2] > rows:
            raise ValueError(
                f"key_norms must be [{batch}, {num_kv_heads}, at most {rows}], got {list(key_norms.shape)}"
            )
        check_tensor("value_norms", value_norms, shape=tuple(key_norms.shape), dtypes=(wide,))
        named = {"shared": shared, "key_norms": key_norms, "value_norms": value_norms, "upper": bool(upper)}
        for name, value in {**named, "num_kv_heads": num_kv_heads}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        layer = "upper" if self.upper else "lower"
        return f"PairedBlock({layer}, slots={self.num_slots}, KV heads={self.num_kv_heads}, batch={self.batch_size})"

    def _own(self, rows: Tensor, norms: Tensor) -> Tensor:
        slots = norms.shape[2]
        rows = rows[:, :, rows.shape[2] - slots :] if self.upper else rows[:, :, :slots]
        return (rows * norms[..., None]).to(rows.dtype)

    @property
    def keys(self) -> Tensor:
        return self._own(self.shared.keys, self.key_norms)

    @property
    def values(self) -> Tensor:
        return self._own(self.shared.values, self.value_norms)

    @property
    def batch_size(self) -> int:
        return self.key_norms.shape[0]

    @property
    def head_dim(self) -> int:
        return self.shared.keys.shape[3]

    @property
    def num_slots(self) -> int:
        return self.key_norms.shape[2]

    @property
    def slot_counts(self) -> Tensor:
        return torch.full((self.batch_size, self.num_kv_heads), self.num_slots)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; what both layers hold is the lower one's, so that it counts once."""
        shared = {} if self.upper else {"shared_keys": self.shared.keys, "shared_values": self.shared.values}
        return {**shared, "key_norms": self.key_norms, "value_norms": self.value_norms}

    def plain(self) -> CompactBlock:
        return CompactBlock(self.keys, self.values)

    def heads(self) -> list[list[tuple[Tensor, Tensor, Tensor | None]]]:
        return self.plain().heads()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PairedBlock":
        shared = self.shared.to(device, dtype)
        wide = torch.float64 if shared.keys.dtype == torch.float64 else torch.float32
        return PairedBlock(shared, self.key_norms.to(device, wide), self.value_norms.to(device, wide), self.upper)

    def index_batch(self, index: Tensor) -> "PairedBlock":
        norms = (x.index_select(0, index) for x in (self.key_norms, self.value_norms))
        return PairedBlock(self.shared.index_batch(index), *norms, self.upper)


def _cat_head(parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor | None]:
    beta = None
    if any(b is not None for _, _, b in parts):
        dtype = torch.float64 if parts[0][0].dtype == torch.float64 else torch.float32
        beta = torch.cat([k.new_zeros(k.shape[0], dtype=dtype) if b is None else b for k, _, b in parts])
    return torch.cat([k for k, _, _ in parts]), torch.cat([v for _, v, _ in parts]), beta


@dataclass(frozen=True)
class WindowBlock:
    """The last tokens of a sliding-window layer, as they are: such layers are never compacted.

    Attributes:
        keys, values: ``[B, Hkv, w, d]`` with w <= window - 1, rotated, the newest token last.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self):
        check_tensor("keys", self.keys, ndim=4)
        check_tensor("values", self.values, shape=tuple(self.keys.shape), dtypes=(self.keys.dtype,))

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {"window_keys": self.keys, "window_values": self.values}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "WindowBlock":
        return WindowBlock(self.keys.to(device, dtype), self.values.to(device, dtype))

    def index_batch(self, index: Tensor) -> "WindowBlock":
        return WindowBlock(self.keys.index_select(0, index), self.values.index_select(0, index))


Block = CompactBlock | WindowBlock


@dataclass(frozen=True)
class CompactCache:
    """A context, compacted: what ``model.compact(...)`` returns and ``model.generate(..., past_key_values=cache)`` takes.

    Immutable: a question never changes it, so one cache answers any number of questions, and with batch size 1 any batch.

    Attributes:
        layers: one block per layer.
        logical_length: tokens that the context had (padding included): new tokens take positions from there, not from the
            number of slots.
        fingerprint: of the model that made it; checked when it is used or loaded.
        ropes: layer kind ("full", "sliding") -> the rotation of the keys; for ``compose``.
        lengths: None, or int64 ``[B]``: tokens of each batch element without padding.
        method: name of the method that made it.
        info: JSON-able details of how it was made (options, ratio, …).
    """

    layers: tuple[Block, ...]
    logical_length: int
    fingerprint: dict[str, Any]
    ropes: dict[str, Rope] = field(default_factory=dict)
    lengths: Tensor | None = None
    method: str = "unknown"
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers must hold at least one block")
        check_int("logical_length", self.logical_length, minimum=1)
        batches = {block.batch_size for block in self.layers}
        if len(batches) != 1:
            raise ValueError(f"all layers must have one batch size, got {sorted(batches)}")
        if self.lengths is not None:
            check_tensor("lengths", self.lengths, shape=(self.batch_size,), dtypes=(torch.int64,))
            if self.lengths.min() < 1 or self.lengths.max() > self.logical_length:
                raise ValueError(f"lengths must lie in [1, {self.logical_length}], got {self.lengths.tolist()}")

    @property
    def batch_size(self) -> int:
        return self.layers[0].batch_size

    @property
    def compact_layers(self) -> list[CompactBlock]:
        return [block for block in self.layers if isinstance(block, CompactBlock)]

    @property
    def slots_per_layer(self) -> list[int]:
        """Slots of the fullest KV head, per compacted layer."""
        return [block.num_slots for block in self.compact_layers]

    @property
    def num_slots(self) -> int:
        """Slots per compacted layer and KV head: their mean, rounded, when layers or heads hold unequal numbers."""
        counts = torch.cat([block.slot_counts.reshape(-1) for block in self.compact_layers])
        return round(counts.double().mean().item())

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies: keys, values, biases, offsets, the windows of sliding layers."""
        return sum(block.nbytes for block in self.layers)

    @property
    def logical_nbytes(self) -> int:
        """Bytes that the same layers would occupy with every token kept (sliding layers as they are)."""
        tokens = self.batch_size * self.logical_length if self.lengths is None else int(self.lengths.sum())
        full = 0
        for block in self.layers:
            if isinstance(block, CompactBlock):
                full += 2 * tokens * block.num_kv_heads * block.head_dim * block.keys.element_size()
            else:
                full += block.nbytes
        return full

    @property
    def device(self) -> torch.device:
        return self.layers[0].keys.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].keys.dtype

    def get_seq_length(self, *args: Any) -> int:
        """What a model that is not patched asks of its cache first.

        Raises:
            TypeError: always: only a patched model can use the cache.
        """
        raise TypeError(
            "the cache is a CompactCache, which this model cannot use before kvcompact_kernels.patch_model(model)"
        )

    def __repr__(self) -> str:
        return (
            f"CompactCache(method={self.method!r}, tokens={self.logical_length}, slots={self.num_slots}, "
            f"layers={len(self.layers)}, batch={self.batch_size}, {self.nbytes / 2**20:.2f} MiB, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "CompactCache":
        """The cache on another device or with keys and values in another floating dtype (beta stays fp32).

        ``to(device)``, ``to(dtype)`` and ``to(device, dtype)`` as a tensor's.
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
        ropes = {kind: replace(r, inv_freq=r.inv_freq.to(device)) for kind, r in self.ropes.items()}
        lengths = None if self.lengths is None else self.lengths.to(device)
        return replace(self, layers=tuple(b.to(device, dtype) for b in self.layers), ropes=ropes, lengths=lengths)

    @staticmethod
    def compose(caches: Sequence["CompactCache"], reposition: bool = True) -> "CompactCache":
        """One cache that holds the slots of several, in order.

        Args:
            caches: caches of one model; batch size 1 each, or all the same.
            reposition: move each cache's keys behind the tokens of those before it, as if their texts stood one after
                the other (rotations compose, so this is exact for one cache's own geometry); the logical length is then
                the sum. False keeps every key where it is, as Cartridges do (arXiv 2506.06266, section 5); the logical
                length is then the longest one's.

        Layers of several caches have slots of their own, also where those of one cache shared them (method "minicache").

        Raises:
            ValueError: no cache, caches of different models, padded caches, or a rope type whose keys cannot be moved.
        """
        if isinstance(caches, CompactCache):
            raise TypeError("caches must be a list of CompactCaches, got one CompactCache")
        caches = list(caches)
        if not caches:
            raise ValueError("caches must hold at least one cache")
        for i, cache in enumerate(caches):
            if not isinstance(cache, CompactCache):
                raise TypeError(f"caches[{i}] must be a CompactCache, got {type(cache).__name__}")
            different = fingerprint_differences(cache.fingerprint, caches[0].fingerprint)
            if different:
                raise ValueError(f"caches[{i}] is of another model than caches[0]: {'; '.join(different)}")
            if cache.lengths is not None:
                raise ValueError(f"caches[{i}] holds padded contexts, which cannot be composed")
        starts, total = [], 0
        for cache in caches:
            starts.append(total if reposition else 0)
            total = total + cache.logical_length if reposition else max(total, cache.logical_length)
        layers = []
        for index in range(len(caches[0].layers)):
            kind = "full" if isinstance(caches[0].layers[index], CompactBlock) else "sliding"
            moved = [_shift(c.layers[index], c.ropes.get(kind), start) for c, start in zip(caches, starts)]
            layers.append(CompactBlock.cat(moved) if kind == "full" else _last_window(moved))
        batch = max(block.batch_size for block in layers)
        index = torch.zeros(batch, dtype=torch.int64, device=caches[0].device)
        layers = [b if b.batch_size == batch else b.index_batch(index) for b in layers]
        return replace(
            caches[0],
            layers=tuple(layers),
            logical_length=total,
            method="+".join(dict.fromkeys(c.method for c in caches)),
            info={"composed": [{"method": c.method, "logical_length": c.logical_length} for c in caches]},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to one safetensors file, atomically: the file is complete or is not there.

        Raises:
            OSError: the folder does not exist or the disk is full; nothing is left behind.
        """
        path = Path(path)
        tensors = {f"layers.{i}.{n}": x for i, block in enumerate(self.layers) for n, x in block.tensors().items()}
        tensors |= {f"ropes.{kind}.inv_freq": rope.inv_freq for kind, rope in self.ropes.items()}
        if self.lengths is not None:
            tensors["lengths"] = self.lengths
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION if any(isinstance(block, PairedBlock) for block in self.layers) else 1,
            "fingerprint": self.fingerprint,
            "logical_length": self.logical_length,
            "num_layers": len(self.layers),
            "num_kv_heads": [block.num_kv_heads for block in self.layers],
            "ropes": {
                kind: {"attention_scaling": r.attention_scaling, "rope_type": r.rope_type}
                for kind, r in self.ropes.items()
            },
            "method": self.method,
            "info": self.info,
        }
        save_safetensors(path, tensors, {FORMAT: json.dumps(header)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        check_weights: bool = True,
    ) -> "CompactCache":
        """Reads a cache that :meth:`save` wrote.

        Args:
            path: the file.
            model: the Hugging Face model that will use it; its fingerprint must match, and the cache goes to its device
                and dtype. None skips both.
            device, dtype: where to, instead of the model's.
            check_weights: also compare the digest of the weights; False takes the cache of a fine-tuned sibling of the
                model, too, and makes it one of this model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is no cache, is of a newer format or of another model.
        """
        header, tensors = load_safetensors(path, FORMAT, FORMAT_VERSION)
        try:
            cache = cls._from_file(header, tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFileError(f"{path} is damaged: {error}") from error
        if model is not None:
            from .patch import check_fingerprint

            wanted = check_fingerprint(cache, model, f"{path}", check_weights=check_weights)
            cache = replace(cache, fingerprint=wanted)
            weight = next(model.parameters())
            device, dtype = device or weight.device, dtype or weight.dtype
        return cache.to(device, dtype)

    @classmethod
    def _from_file(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> "CompactCache":
        layers, shared = [], None
        for i in range(header["num_layers"]):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            if "window_keys" in own:
                layers.append(WindowBlock(own["window_keys"], own["window_values"]))
            elif "key_norms" in own:
                upper = "shared_keys" not in own
                shared = shared if upper else SharedSlots(own["shared_keys"], own["shared_values"])
                layers.append(PairedBlock(shared, own["key_norms"], own["value_norms"], upper))
                shared = None if upper else shared
            else:
                block = CompactBlock(
                    own["keys"], own["values"], own.get("beta"), own.get("offsets"), header["num_kv_heads"][i]
                )
                layers.append(block)
        ropes = {kind: Rope(tensors[f"ropes.{kind}.inv_freq"], **meta) for kind, meta in header["ropes"].items()}
        return cls(
            tuple(layers),
            header["logical_length"],
            header["fingerprint"],
            ropes,
            tensors.get("lengths"),
            header["method"],
            header["info"],
        )


def _set_attribute(cache: CompactCache, name: str, value: Any, frozen: Any = CompactCache.__setattr__) -> None:
    if name == "_is_user_defined":  # transformers' generate marks the caches that it is given
        cache.get_seq_length()
    frozen(cache, name, value)


CompactCache.__setattr__ = _set_attribute


def _shift(block: Block, rope: Rope | None, distance: int) -> Block:
    if distance == 0:
        return block
    if rope is None:
        raise ValueError("a cache without its rotary embedding cannot be moved: compose with reposition=False")
    return replace(block.plain() if isinstance(block, CompactBlock) else block, keys=rope.shift(block.keys, distance))


def _last_window(blocks: list[WindowBlock]) -> WindowBlock:
    """The newest tokens of a sliding layer: as many as the longest window held."""
    size = max(b.keys.shape[2] for b in blocks)
    batch = max(b.batch_size for b in blocks)
    keys = torch.cat([b.keys.expand(batch, -1, -1, -1) for b in blocks], 2)[:, :, -size:]
    values = torch.cat([b.values.expand(batch, -1, -1, -1) for b in blocks], 2)[:, :, -size:]
    return WindowBlock(keys, values)


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside ``path`` and moves it there once it is complete."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file is to be written")
    # safetensors refuses views of one storage, so each tensor is written from memory of its own
    own = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(own, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def safetensors_formats(path: str | os.PathLike) -> set[str]:
    """Names of the headers that a safetensors file carries.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or damaged.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return set(file.metadata() or {})
    except SafetensorError as error:
        raise BadFileError(f"{path} is truncated or damaged: {error}") from error


def load_safetensors(
    path: str | os.PathLike, format_name: str, format_version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON header stored under ``format_name`` and the tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, of another format, or of a newer version.
    """
    path = Path(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if format_name not in metadata:
                raise BadFileError(f"{path} is not a {format_name} file")
            header = json.loads(metadata[format_name])
            if not isinstance(header.get("version"), int) or header["version"] > format_version:
                raise BadFileError(
                    f"{path} has format version {header.get('version')!r}; this release reads up to {format_version}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict: it has no __iter__)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} is truncated or damaged: {error}") from error
    return header, tensors
