# SPDX-License-Identifier: Apache-2.0
"""``cartridge``: a block of slots as a trainable object, and the initialisation that it is trained from."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import BadFileError, check_int
from ..cache import CompactBlock, CompactCache, WindowBlock
from ..model_spec import ModelSpec, fingerprint_differences
from ._selection import SelectionMethod, check_layer
from .base import LayerInput, register_method


@register_method
@dataclass
class CartridgeInit(SelectionMethod):
    """Keeps the first tokens of the context, where the training of a cartridge starts; or takes a trained one from a file.

    Cartridges (arXiv 2506.06266, section 3): initialising with the keys and values of the corpus's first tokens trains
    far better than a random start. Untrained, it knows nothing of the rest: make a :class:`Cartridge` of it.

    Attributes:
        file: a cartridge that was trained on the context at hand: its slots, moved so that the next token stands as far
            from them as in training. This is for comparing it with other methods; it knows no other context.
    """

    name = "cartridge"
    summary = (
        "the first tokens, which a trainable Cartridge starts from; with file=FILE a trained one of this very context"
    )
    source = "Cartridges, arXiv 2506.06266, section 3"

    file: str | None = None

    def __post_init__(self):
        self._trained: CompactCache | None = None
        if self.file is not None:
            if not isinstance(self.file, (str, os.PathLike)):
                raise TypeError(f"file must be a path, got {type(self.file).__name__}")
            cache = CompactCache.load(self.file)
            if cache.batch_size != 1:
                raise BadFileError(f"{self.file} must hold one context, got {cache.batch_size}")
            self._trained = cache

    @property
    def min_slots(self) -> int:
        if self._trained is None:
            return 1
        counts = torch.cat([block.slot_counts.flatten() for block in self._trained.compact_layers])
        return -(-int(counts.sum()) // counts.numel())

    @property
    def whole_context_only(self) -> str | None:
        return None if self._trained is None else "takes the slots of one context from a file"

    def prepare(self, spec: ModelSpec) -> None:
        """Raises ValueError when the file is of another model."""
        if self._trained is not None:
            different = fingerprint_differences(self._trained.fingerprint, spec.fingerprint)
            if different:
                raise ValueError(f"{self.file} was made by another model: {'; '.join(different)}")

    def select(self, layer: LayerInput, slots: int) -> Tensor:
        return torch.arange(slots)

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        """The file's slots need not be all that were asked for; fewer than it holds are refused."""
        if self._trained is None:
            return super().compact_layer(layer, slots)
        check_layer(self, layer, slots)
        block = self._trained.compact_layers[layer.layer_idx].plain().to(layer.keys.device, layer.keys.dtype)
        if layer.keys.shape[0] != 1:
            raise ValueError(f"{self.file} holds one context, the batch has {layer.keys.shape[0]}")
        distance = int(layer.positions[-1]) + 1 - self._trained.logical_length
        return replace(block, keys=layer.rope.shift(block.keys, distance)) if distance else block


class Cartridge(nn.Module):
    """A compact cache whose keys and values are parameters (arXiv 2506.06266).

    Any cache can be the start. The first ``sinks`` slots of each layer are frozen: they are the attention sink, and training
    does better without moving it. Sliding-window layers stay as they are.

    Args:
        cache: batch size 1; heads may hold unequal numbers of slots.
        sinks: leading slots of each KV head that are not trained, fewer than any head has.
        train_beta: also train a bias per slot (from 0, or from the cache's own); otherwise a bias of the cache stays fixed.
        logical_length: position of the first token after the cartridge, if not the cache's own: the number of slots makes
            a cartridge that stands right before the question.
        dtype: of the parameters; fp32, for an optimizer's steps are lost in bf16.

    Example::

        cartridge = Cartridge.from_cache(model.compact(ids, slots=256, method="cartridge"))
        optimizer = torch.optim.Adam(cartridge.parameters(), lr=2e-2)
        logits = model(questions, past_key_values=cartridge.to_cache(dtype=model.dtype)).logits
    """

    def __init__(
        self,
        cache: CompactCache,
        *,
        sinks: int = 1,
        train_beta: bool = False,
        logical_length: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not isinstance(cache, CompactCache):
            raise TypeError(f"cache must be a CompactCache, got {type(cache).__name__}")
        check_int("sinks", sinks, minimum=0)
        if logical_length is not None:
            check_int("logical_length", logical_length, minimum=1)
        if cache.batch_size != 1 or cache.lengths is not None:
            raise ValueError(f"cache must hold one context without padding, got batch size {cache.batch_size}")
        if not cache.compact_layers:
            raise ValueError("cache must have at least one compacted layer")
        for i, block in enumerate(cache.layers):
            if isinstance(block, CompactBlock):
                least = int(block.slot_counts.min())
                if sinks >= least:
                    raise ValueError(f"sinks must be less than the {least} slots of layer {i}, got {sinks}")
        self.sinks, self.train_beta = sinks, bool(train_beta)
        self.logical_length = cache.logical_length if logical_length is None else logical_length
        self.fingerprint, self.ropes, self.info = cache.fingerprint, cache.ropes, dict(cache.info)
        self.kinds = ["full" if isinstance(b, CompactBlock) else "sliding" for b in cache.layers]
        self.keys, self.values, self.beta = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i, block in enumerate(cache.layers):
            keys, values = (x.detach().to(dtype, copy=True) for x in (block.keys, block.values))
            if self.kinds[i] == "sliding":
                self.register_buffer(f"fixed_keys_{i}", keys)
                self.register_buffer(f"fixed_values_{i}", values)
                continue
            offsets = block.offsets
            self.register_buffer(f"offsets_{i}", offsets)
            rows = None if offsets is None else _sinks_first(offsets, sinks)
            self.register_buffer(f"order_{i}", None if rows is None else rows.argsort())
            first = sinks if rows is None else sinks * block.num_kv_heads
            (fixed_keys, keys), (fixed_values, values) = (_parted(x, rows, first) for x in (keys, values))
            self.register_buffer(f"fixed_keys_{i}", fixed_keys)
            self.register_buffer(f"fixed_values_{i}", fixed_values)
            self.keys.append(keys)
            self.values.append(values)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            beta = None if block.beta is None else block.beta.detach().to(wide, copy=True)
            if beta is None and train_beta:
                beta = block.keys.new_zeros(block.keys.shape[:-1], dtype=wide)
            if train_beta:
                beta, trained = _parted(beta, rows, first)
                self.beta.append(trained)
            self.register_buffer(f"fixed_beta_{i}", beta)

    @classmethod
    def from_cache(cls, cache: CompactCache, **options: Any) -> "Cartridge":
        """The cartridge that starts as ``cache``; options as for the class."""
        return cls(cache, **options)

    def block(self, layer: int) -> CompactBlock | WindowBlock:
        """One layer of :meth:`to_cache`, in the parameters' dtype."""
        keys, values = getattr(self, f"fixed_keys_{layer}"), getattr(self, f"fixed_values_{layer}")
        if self.kinds[layer] == "sliding":
            return WindowBlock(keys, values)
        beta, offsets, order = (getattr(self, f"{name}_{layer}") for name in ("fixed_beta", "offsets", "order"))
        number = self.kinds[:layer].count("full")
        if self.train_beta:
            beta = _joined(beta, self.beta[number], order)
        keys, values = _joined(keys, self.keys[number], order), _joined(values, self.values[number], order)
        return CompactBlock(keys, values, beta, offsets, 0 if offsets is None else offsets.numel() - 1)

    def to_cache(self, dtype: torch.dtype | None = None) -> CompactCache:
        """The cache of the present parameters, which gradients flow back through; compose it with ``CompactCache.compose``.

        Args:
            dtype: of keys and values, the model's; None is the parameters' own.
        """
        layers = [self.block(i).to(dtype=dtype) for i in range(len(self.kinds))]
        info = {**self.info, "cartridge": {"sinks": self.sinks, "train_beta": self.train_beta}}
        ropes = {kind: replace(r, inv_freq=r.inv_freq.to(layers[0].keys.device)) for kind, r in self.ropes.items()}
        return CompactCache(tuple(layers), self.logical_length, self.fingerprint, ropes, None, "cartridge", info)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a ``CompactCache`` file: :meth:`load` makes a cartridge of it, ``CompactCache.load`` a cache to use."""
        with torch.no_grad():
            self.to_cache().save(path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any = None, *, check_weights: bool = True) -> "Cartridge":
        """Reads what :meth:`save` wrote, in the parameters' dtype.

        Args:
            model: the Hugging Face model that it is for; its fingerprint must match, and the cartridge goes to its device.
            check_weights: False takes a fine-tuned sibling of the model, too (see ``CompactCache.load``).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, no cartridge, of a newer format or of another model.
        """
        cache = CompactCache.load(path)
        options = cache.info.get("cartridge")
        if not isinstance(options, dict) or options.keys() != {"sinks", "train_beta"}:
            raise BadFileError(f"{path} is a compact cache, but no cartridge: load it with CompactCache.load")
        if model is not None:
            from ..patch import check_fingerprint

            wanted = check_fingerprint(cache, model, f"{path}", check_weights=check_weights)
            cache = replace(cache, fingerprint=wanted).to(next(model.parameters()).device)
        return cls(cache, dtype=cache.dtype, **options)


def _sinks_first(offsets: Tensor, sinks: int) -> Tensor:
    """Rows of a packed block: the first ``sinks`` of each KV head, then all others."""
    starts = offsets[:-1]
    first = (starts[:, None] + torch.arange(sinks, device=offsets.device)).flatten()
    others = torch.ones(int(offsets[-1]), dtype=torch.bool, device=offsets.device)
    others[first] = False
    return torch.cat([first, others.nonzero()[:, 0]])


def _parted(x: Tensor, rows: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """The sinks' rows and the others, each in memory of its own: of a packed ``x`` the ``first`` of ``rows`` (see
    :func:`_sinks_first`), of ``[1, Hkv, t, ...]`` the first of each head."""
    if rows is None:
        return x[:, :, :first].clone(), x[:, :, first:].clone()
    return x[rows[:first]], x[rows[first:]]


def _joined(fixed: Tensor, trained: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of :func:`_parted`; ``order`` is where each packed row is found in the two."""
    return torch.cat([fixed, trained], 2) if order is None else torch.cat([fixed, trained])[order]
