# SPDX-License-Identifier: Apache-2.0
"""``still``: a small network per layer turns T tokens into t slots in one forward pass."""

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int
from ..cache import CompactBlock, safetensors_formats
from ..head_shares import HeadShares
from ..layer_networks import LayerNetworks
from ..model_spec import ModelSpec
from ..ops.still_compaction import still_compaction
from ..reference import matching
from ..rope import Rope
from ..still_config import StillConfig, init_still_parameters, still_parameter_shapes
from ..token_selector import MAX_QUERIES, TokenSelector, token_features
from ._selection import check_layer, check_share, leading_sinks, whole_layer
from .attention_matching import fit_best, queries_from_behind
from .base import LayerInput, Method, register_method

IDENTITY = "identity"
WEIGHTS = Path(__file__).parent.parent / "weights"
# what a selector compacts at once where nothing is said, and the slots that a chunk gets at least
_CHUNK, _CHUNK_SLOTS = 1024, 24
_HEADS, _LAYERS, _EQUAL = "heads", "layers", "equal"


class StillCompactor(LayerNetworks):
    """STILL's parameters (arXiv 2606.07878) for every compacted layer of one model; see :class:`LayerNetworks`."""

    file_format = "kvcompact-still"
    config_type = StillConfig
    shapes = staticmethod(still_parameter_shapes)
    start = staticmethod(init_still_parameters)

    def forward(
        self,
        layer_idx: int,
        keys: Tensor,
        values: Tensor,
        rope: Rope,
        positions: Tensor | None = None,
        backend: str = "auto",
    ) -> CompactBlock:
        """The block of compacted layer ``layer_idx``, differentiable; the other arguments as in ``ops.still_compaction``."""
        params = dict(self.layers[layer_idx].items())
        return CompactBlock(*still_compaction(keys, values, params, self.config, rope, positions, backend=backend))


@register_method
@dataclass
class Still(Method):
    """STILL (arXiv 2606.07878): small networks, trained once against the frozen model, turn a layer's tokens into slots.

    What a file of weights holds decides how:

    - a :class:`~kvcompact_kernels.token_selector.TokenSelector` (``kvcompact train selector``) says which tokens later text
      and later questions will attend to. Their keys are kept; biases and values are fitted to the context's own queries as
      ``attention_matching`` does. One file serves any number of slots and any length.
    - a :class:`StillCompactor` (``kvcompact train still``) is the paper's Perceiver: latents attend to the tokens and become
      the slots. A file fixes their number.

    Attributes:
        weights: file of ``kvcompact train selector`` or ``kvcompact train still``. None takes the selector that comes with
            the package where there is one for the model (SmolLM2-135M-Instruct), else, with a warning, "identity": a
            Perceiver at its identity-style initialisation, in which each slot averages the tokens nearest to it, a starting
            point for training and a check of the machinery.
        chunk: compact chunks of about so many tokens by themselves, each to its share of the slots (the iterative mode);
            a number beyond the context's tokens takes it at once. None does so with a Perceiver; with a selector it takes
            chunks of 1,024, or of so many more that each has 24 slots. More facts survive than in one piece, plain text is
            continued somewhat worse (docs/results.md), and the cost grows with T, not with its square.
        config: fields of ``StillConfig`` for the identity initialisation, except slots, head_dim and num_kv_heads. Unlike
            there, ``sink`` is 1 unless given: the first token of each chunk stays exact, for losing it is ruinous.
        check_weights: False accepts weights trained for a fine-tuned sibling of the model. Those of the package are for all
            models of the same shape and rotation.
        recall_weight: with a selector: how much the attention that questions are expected to give counts beside that of the
            text's continuation. More keeps more facts, less stays closer to the full cache's predictions of plain text. None
            takes the file's.
        shares: with a selector: how the slots are shared. "heads": each KV head gets what it was measured to need
            (``SelectorConfig.shares``), "layers": each layer does, and its heads get equal numbers, so that blocks stay
            rectangular; "equal": all get the same, as they do where the file says nothing. A file of ``kvcompact train
            shares`` (or ``HeadShares``) is taken instead of what the selector's says. The number of all slots is equal.
        sinks: with a selector: first tokens of the context that are kept in any case.
        mass_ridge, value_ridge: with a selector: as for ``attention_matching``. Larger here: what a question will look at
            gets little attention while the context is read, and its values should stay as they are.
    """

    name = "still"
    summary = "trained networks choose tokens (or make slots) in one pass; comes with weights for the demo's model"
    source = "STILL, arXiv 2606.07878; slots from selected tokens, fitted as in arXiv 2602.16284"

    weights: str | None = None
    chunk: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    check_weights: bool = True
    recall_weight: float | None = None
    shares: str | HeadShares = "heads"
    sinks: int = 4
    mass_ridge: float = 1e-2
    value_ridge: float = 2e-2

    def __post_init__(self):
        if self.chunk is not None:
            check_int("chunk", self.chunk, minimum=1)
        if not isinstance(self.config, dict):
            raise TypeError(f"config must be a dict of StillConfig fields, got {type(self.config).__name__}")
        if not isinstance(self.check_weights, bool):
            raise TypeError(f"check_weights must be a bool, got {type(self.check_weights).__name__}")
        if self.recall_weight is not None:
            self.recall_weight = check_share("recall_weight", self.recall_weight, minimum=1e-6)
        self._measured = None
        if isinstance(self.shares, HeadShares):
            self._measured = self.shares
        elif self.shares not in (_HEADS, _LAYERS, _EQUAL):
            self._measured = self._load_shares(self.shares)
        check_int("sinks", self.sinks, minimum=0)
        self.mass_ridge = check_share("mass_ridge", self.mass_ridge, minimum=1e-8)
        self.value_ridge = check_share("value_ridge", self.value_ridge, minimum=1e-8)
        self._trained: StillCompactor | TokenSelector | None = None
        self._prepared: dict[str, Any] | None = None
        self._untrained: dict[StillConfig, dict[str, Tensor]] = {}
        if self.weights not in (None, IDENTITY):
            if self.config:
                raise ValueError("config must be left out with weights: the file holds its own")
            self._trained = load_weights(self.weights).requires_grad_(False)
        else:
            fixed = {"slots", "head_dim", "num_kv_heads"} & self.config.keys()
            if fixed:
                raise ValueError(f"config must leave out {sorted(fixed)}: they follow from the context and the model")
            try:
                self._config(slots=1 << 20, head_dim=2, num_kv_heads=1)
            except TypeError as error:
                raise TypeError(f"config: {error}") from error

    @staticmethod
    def _load_shares(path: Any) -> HeadShares:
        try:
            return HeadShares.load(path)
        except FileNotFoundError as error:
            allowed = ", ".join(map(repr, (_HEADS, _LAYERS, _EQUAL)))
            raise ValueError(f"shares must be one of {allowed} or a file, got {path!r}") from error

    def _config(self, slots: int, head_dim: int, num_kv_heads: int) -> StillConfig:
        options = {"sink": 1, **self.config}
        return StillConfig(slots=slots, head_dim=head_dim, num_kv_heads=num_kv_heads, **options)

    @property
    def queries_needed(self) -> int:
        return -1 if isinstance(self._trained, TokenSelector) else 0

    @property
    def min_slots(self) -> int:
        if isinstance(self._trained, TokenSelector):
            return self.sinks + 1
        return 1 if self._trained is not None else self.config.get("sink", 1) + 1

    def with_shares(self, shares: HeadShares | str | None) -> "Still":
        """See ``Method.with_shares``; a selector's file may say others, which count no more.

        Raises:
            ValueError: there is no selector.
        """
        unknown = self.weights is None and not self.config and self._prepared is None
        if not unknown and not isinstance(self._trained, TokenSelector):
            raise ValueError(f"method {self.name!r} gives heads unequal numbers of slots with a selector only")
        return replace(self, shares=_EQUAL if shares is None else shares)

    def prepare(self, spec: ModelSpec) -> None:
        """Takes the package's weights for the model where none were named.

        Raises:
            ValueError: the weights were trained for another model.
        """
        if self.weights is None and not self.config:
            if self._prepared != spec.fingerprint:
                self._trained, self._prepared = packaged_selector(spec), dict(spec.fingerprint)
                if self._trained is None:
                    warnings.warn(
                        "the package has no weights of method 'still' for this model, so it is untrained: train some with "
                        "`kvcompact train selector` and name them with weights=, or say weights='identity'",
                        stacklevel=2,
                    )
        elif self._trained is not None:
            self._trained.check_model(spec, f"weights {self.weights}", self.check_weights)
        if self._measured is not None:
            if not isinstance(self._trained, TokenSelector):
                raise ValueError(f"shares must be {_HEADS!r} without a selector, got {self.shares!r}")
            self._measured.check_model(spec, f"shares {self.shares}")

    def _chunks(self, num_tokens: int, slots: int) -> list[int]:
        """Ends of near-equal chunks."""
        if self.chunk is not None:
            return _ends(num_tokens, round(num_tokens / self.chunk))
        if isinstance(self._trained, TokenSelector):
            return _ends(num_tokens, min(round(num_tokens / _CHUNK), slots // _CHUNK_SLOTS))
        return [num_tokens]

    def budgets(self, slots: int, num_tokens: int, num_layers: int) -> list[int]:
        """The same for every layer, but as ``shares`` says with a selector.

        Raises:
            ValueError: a trained Perceiver makes another number of slots.
        """
        if isinstance(self._trained, StillCompactor):
            made = self._trained.config.slots * len(self._chunks(num_tokens, slots))
            if slots != made:
                raise ValueError(
                    f"slots must be {made}, for weights {self.weights} make {self._trained.config.slots} slots"
                    f"{'' if self.chunk is None else ' of each chunk'}; got {slots} for {num_tokens} tokens"
                )
        shares = self._shares()
        if shares is None:
            return [slots] * num_layers
        # of a layer's slots the first chunk, the shortest, must get enough
        first = num_tokens if self.chunk is None else self._chunks(num_tokens, slots)[0]
        least = min(slots, -(-self.min_slots * num_tokens // first))
        return shares.layers(slots, least, num_tokens)

    def _shares(self) -> HeadShares | None:
        if self.shares == _EQUAL or not isinstance(self._trained, TokenSelector):
            return None
        return self._measured or self._trained.head_shares

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if isinstance(self._trained, StillCompactor):
            self.budgets(slots, layer.num_tokens, 1)
        blocks, start, used = [], 0, 0
        for end in self._chunks(layer.num_tokens, slots):
            share = slots * end // layer.num_tokens - used
            if isinstance(self._trained, TokenSelector):
                blocks.append(self._select(layer, start, end, share))
            else:
                blocks.append(self._compact_chunk(layer, start, end, share))
            start, used = end, used + share
        return CompactBlock.cat(blocks)

    def _select(self, layer: LayerInput, start: int, end: int, slots: int) -> CompactBlock:
        """The block of the tokens ``start`` to ``end``, see :class:`_Seen`."""
        sinks = leading_sinks(layer, self.sinks)
        if start + slots <= sinks:
            raise ValueError(
                f"slots: a chunk of {end - start} tokens gets {slots}, but needs {sinks + 1}; "
                "ask for more slots or larger chunks"
            )
        if slots == end - start:
            return whole_layer(_part(layer, 0, start, end))
        seen = _Seen.of(layer, start, end, sinks)
        selector = self._trained.to(layer.keys.device)
        scores = selector.scores(layer.layer_idx, seen.keys, seen.part.values, seen.attention, self.recall_weight)
        shares = self._shares() if self.shares != _LAYERS else None
        counts = [slots] * layer.keys.shape[1]
        if shares is not None:
            least = min(slots, 1 if seen.before else sinks + 1)
            counts = shares.heads(layer.layer_idx, slots, least, end - start)
        return fit_best(
            seen.part, seen.queries, seen.outputs, seen.lse, scores, counts, self.mass_ridge, self.value_ridge,
            first=sinks, before=seen.before,
        )  # fmt: skip

    def _compact_chunk(self, layer: LayerInput, start: int, end: int, slots: int) -> CompactBlock:
        keys, values = layer.keys[:, :, start:end], layer.values[:, :, start:end]
        if self._trained is not None:
            params = {name: p.to(keys.device) for name, p in self._trained.layers[layer.layer_idx].items()}
            config = self._trained.config
        else:
            if slots < self.min_slots:
                raise ValueError(
                    f"slots: a chunk of {end - start} tokens gets {slots}, but needs {self.min_slots}; "
                    "ask for more slots or larger chunks"
                )
            config = self._config(slots, keys.shape[3], keys.shape[1])
            if config not in self._untrained:
                self._untrained[config] = init_still_parameters(config, torch.Generator().manual_seed(0))
            params = {name: p.to(keys.device) for name, p in self._untrained[config].items()}
        return CompactBlock(*still_compaction(keys, values, params, config, layer.rope, layer.positions[start:end]))


@torch.no_grad()
def expected_recall(layer: LayerInput, selector: TokenSelector, sinks: int = 4) -> Tensor:
    """The attention that questions are expected to give each token, fp32 ``[B, Hkv, T]``; the text goes through in the
    chunks that :class:`Still` takes, with the ``sinks`` first tokens before each."""
    found, start = [], 0
    for end in _ends(layer.num_tokens, round(layer.num_tokens / _CHUNK)):
        seen = _Seen.of(layer, start, end, leading_sinks(layer, sinks))
        _, recall = selector(layer.layer_idx, *token_features(seen.keys, seen.part.values, seen.attention))
        found.append(recall[:, :, seen.before :].exp())
        start = end
    return torch.cat(found, 2)


def _ends(num_tokens: int, count: int) -> list[int]:
    """Ends of ``count`` near-equal chunks, at least one."""
    count = max(1, count)
    return [num_tokens * (i + 1) // count for i in range(count)]


@dataclass(frozen=True)
class _Seen:
    """Tokens of a layer as seen from behind the whole context, for that is where queries will come from. The context's sinks
    stand before a later chunk meanwhile: without them its queries would spread over the chunk what they really give to the
    sinks.

    Attributes:
        part: ``before`` sinks, and the tokens.
        queries, outputs, lse, attention: reference queries, and what ``reference.matching.full_attention`` makes of them.
        keys: of the part, un-rotated.
    """

    part: LayerInput
    before: int
    queries: Tensor
    outputs: Tensor
    lse: Tensor
    attention: Tensor
    keys: Tensor

    @classmethod
    def of(cls, layer: LayerInput, start: int, end: int, sinks: int) -> "_Seen":
        before = min(sinks, start)
        part = _part(layer, before, start, end)
        queries = queries_from_behind(part, MAX_QUERIES, int(layer.positions[-1]) + 1)
        outputs, lse, attention = matching.full_attention(queries, part.keys, part.values, part.scale)
        keys = part.rope.unrotate(part.keys, part.positions)
        return cls(part, before, queries, outputs, lse, attention, keys)


def _part(layer: LayerInput, before: int, start: int, end: int) -> LayerInput:
    """The first ``before`` tokens of a layer and those from ``start`` to ``end``, as if they were all; queries of the latter."""
    if end - start == layer.num_tokens:
        return layer

    def cut(x: Tensor, dim: int) -> Tensor:
        part = x.narrow(dim, start, end - start)
        return torch.cat([x.narrow(dim, 0, before), part], dim) if before else part

    queries = layer.queries[:, :, layer.queries.shape[2] - layer.num_tokens :][:, :, start:end]
    return replace(
        layer, keys=cut(layer.keys, 2), values=cut(layer.values, 2), queries=queries, positions=cut(layer.positions, 0)
    )


def load_weights(path: str | os.PathLike) -> StillCompactor | TokenSelector:
    """What a file of weights for :class:`Still` holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or neither a compactor nor a selector.
    """
    if TokenSelector.file_format in safetensors_formats(path):
        return TokenSelector.load(path)
    return StillCompactor.load(path)


def packaged_selector(spec: ModelSpec) -> TokenSelector | None:
    """The selector that comes with the package for models of this shape and rotation, or None."""
    for path in sorted(WEIGHTS.glob("*.safetensors")):
        selector = TokenSelector.load(path)
        try:
            selector.check_model(spec, check_weights=False)
        except ValueError:
            continue
        return selector.requires_grad_(False)
    return None
