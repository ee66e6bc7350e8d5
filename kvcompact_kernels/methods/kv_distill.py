# SPDX-License-Identifier: Apache-2.0
"""``kv_distill``: a trained scorer chooses the tokens, a low-rank adapter changes those that are kept."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import check_int
from ..cache import CompactBlock
from ..kv_distiller import KVDistiller
from ..model_spec import ModelSpec
from ..ops import pack_slots
from ..reference.selection import top_tokens
from ..token_selector import MAX_QUERIES, log_attention
from ._selection import check_layer, leading_sinks, whole_layer
from .attention_matching import own_attention
from .base import LayerInput, Method, register_method
from .still import IDENTITY

_SINKS = 4


@register_method
@dataclass
class KVDistill(Method):
    """KV-Distill (arXiv 2503.10337), fitted to a cache that is there already: learned selection and a low-rank adapter.

    As in the paper the model is frozen, the choice of tokens is learned and does not know the question, what is kept of a
    token is changed by a low-rank adapter, and both are trained until the model's next-token distribution behind the few
    agrees with that behind all, by forward and reverse KL. Details are this library's, for what was read of the paper is
    its abstract and what others say of its method. It differs at least in this:

    - The paper's adapter stands in the model: what is kept is computed anew with adapted weights, so that a kept token can
      gather from the whole context what the others held. A method of this library sees a layer's keys and values after the
      model has read the context. So the adapter adds a low-rank linear function of the token's own keys and values (of all
      heads of the layer) and of those of its ``kernel`` nearest neighbours to both; what stands farther away is lost.
    - Scores are of each layer and KV head, and start from the attention that the context's own queries give a token.
    - Positions stay as they were, the first tokens are kept as they are, and any number of slots can be asked for.

    Attributes:
        weights: file of ``kvcompact train kv_distill``; the package has none. None is
            "identity", with a warning: the start of a training, which keeps the tokens that the context's own queries attend
            to, unchanged.
        check_weights: False accepts weights trained for a fine-tuned sibling of the model.
        sinks: first tokens of the context that are kept in any case, as they are; None takes the file's, or 4.
    """

    name = "kv_distill"
    summary = "a trained scorer chooses tokens, a low-rank adapter changes them; needs weights trained for the model"
    source = "KV-Distill, arXiv 2503.10337, abstract; the adapter works on cached keys and values"

    weights: str | None = None
    check_weights: bool = True
    sinks: int | None = None

    def __post_init__(self):
        if not isinstance(self.check_weights, bool):
            raise TypeError(f"check_weights must be a bool, got {type(self.check_weights).__name__}")
        if self.sinks is not None:
            check_int("sinks", self.sinks, minimum=0)
        self._trained: KVDistiller | None = None
        self._warned: dict[str, Any] | None = None
        if self.weights not in (None, IDENTITY):
            self._trained = KVDistiller.load(self.weights).requires_grad_(False)

    @property
    def queries_needed(self) -> int:
        return -1

    @property
    def min_slots(self) -> int:
        return self._sinks + 1

    @property
    def _sinks(self) -> int:
        if self.sinks is not None:
            return self.sinks
        return _SINKS if self._trained is None else self._trained.config.sinks

    def prepare(self, spec: ModelSpec) -> None:
        """Checks that the weights are the model's.

        Raises:
            ValueError: the weights were trained for another model.
        """
        if self._trained is not None:
            self._trained.check_model(spec, f"weights {self.weights}", self.check_weights)
        elif self.weights is None and self._warned != spec.fingerprint:
            self._warned = dict(spec.fingerprint)
            warnings.warn(
                "the package has no weights of method 'kv_distill', so it is untrained and keeps what the context's own "
                "queries attend to: train some with `kvcompact train kv_distill` and name them with weights=, or say "
                "weights='identity'",
                stacklevel=2,
            )

    @torch.no_grad()
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        check_layer(self, layer, slots)
        if slots == layer.num_tokens:
            return whole_layer(layer)
        attention = own_attention(layer, MAX_QUERIES)
        if self._trained is None:
            indices = top_tokens(log_attention(attention), slots, first=leading_sinks(layer, self._sinks))
            return CompactBlock(*pack_slots(layer.keys, layer.values, indices))
        distiller = self._trained.to(layer.keys.device)
        return distiller(
            layer.layer_idx,
            layer.keys,
            layer.values,
            layer.rope,
            layer.positions,
            attention=attention,
            slots=slots,
            sinks=self._sinks,
        )
