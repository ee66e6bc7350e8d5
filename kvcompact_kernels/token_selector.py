# SPDX-License-Identifier: Apache-2.0
"""A learned answer to "which tokens will later queries attend to?", for every compacted layer of one model.

Selection by the attention that a context gives to itself forgets what nobody has asked about yet: a sentence that states a
fact gets no more attention than its neighbours until the question comes. But that it *states a fact* can be read off its
keys and values. A small network per layer reads them, and is trained to predict the attention that two kinds of later
queries give to each token: those of the text's continuation, and those of questions on it with their answers.
"""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_int
from .head_shares import HeadShares, check_shares
from .layer_networks import LayerNetworks
from .model_spec import ModelSpec

MAX_QUERIES = 8192  # of the context's own, per KV head: what a selector was trained with it is used with
_SMALLEST = 1e-7  # of an attention probability whose logarithm is taken


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of a network that reads tokens and their neighbours: what ``SelectorConfig`` and ``DistillerConfig`` share.

    Attributes:
        head_dim, num_kv_heads: d and Hkv of the model.
        hidden: width of the network.
        kernel: tokens that the middle layer mixes, odd: a fact is more than one token.
    """

    head_dim: int
    num_kv_heads: int
    hidden: int = 96
    kernel: int = 9

    def __post_init__(self):
        for name in ("head_dim", "num_kv_heads", "hidden", "kernel"):
            check_int(name, getattr(self, name), minimum=1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it has a middle; got {self.kernel}")

    @property
    def features(self) -> int:
        """Numbers per token that the network reads: keys, values, three figures per head, two of the place."""
        return self.num_kv_heads * (2 * self.head_dim + 3) + 2

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; calling the class with them is the inverse."""
        return asdict(self)


@dataclass(frozen=True)
class SelectorConfig(ReaderConfig):
    """Sizes of the network, and what is made of its two answers.

    Attributes:
        head_dim, num_kv_heads, hidden, kernel: see :class:`ReaderConfig`.
        trust: in [0, 1]: how far the continuation's attention is the network's answer, and not that of the context's own
            queries (a geometric mean of both, scaled alike): less than 1 is safer on texts unlike those of the training.
        recall_weight: weight of the attention that questions are expected to give, beside 1 for the continuation's.
        shares: ``[layers][Hkv]``, how many slots each KV head gets, relative to the others; None gives all the same.
    """

    trust: float = 0.5
    recall_weight: float = 1.0
    shares: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.shares is not None:
            object.__setattr__(self, "shares", check_shares(self.shares, self.num_kv_heads))
        for name in ("trust", "recall_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= self.trust <= 1:
            raise ValueError(f"trust must be in [0, 1], got {self.trust}")
        if not 0 < self.recall_weight < math.inf:
            raise ValueError(f"recall_weight must be finite and above 0, got {self.recall_weight}")


def reader_shapes(config: ReaderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the parameters that :meth:`TokenReader.read` uses in one layer."""
    hidden, features = config.hidden, config.features
    return {
        "mean": (features,),
        "deviation": (features,),
        "in_weight": (hidden, features),
        "in_bias": (hidden,),
        "mix_weight": (hidden, config.kernel),
        "mid_weight": (hidden, hidden),
        "mid_bias": (hidden,),
    }


def start_reader(config: ReaderConfig, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The initial values of these parameters: features as they are, no mixing of neighbours."""
    made = {}
    for name, shape in reader_shapes(config).items():
        value = torch.zeros(shape)
        if name in ("in_weight", "mid_weight"):
            value.normal_(0.0, shape[-1] ** -0.5, generator=generator)
        elif name == "mix_weight":
            value[:, config.kernel // 2] = 1.0
        elif name == "deviation":
            value.fill_(1.0)
        made[name] = value
    return made


def _shapes(config: SelectorConfig) -> dict[str, tuple[int, ...]]:
    heads = config.num_kv_heads
    return reader_shapes(config) | {
        "out_weight": (2 * heads, config.hidden),
        "out_bias": (2 * heads,),
        "attention_weight": (2 * heads,),
    }


def _start(config: SelectorConfig, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The continuation's attention starts as that of the reference queries, the questions' as a flatter, smaller one."""
    heads = config.num_kv_heads
    return start_reader(config, generator) | {
        "out_weight": torch.zeros(2 * heads, config.hidden),
        "out_bias": torch.tensor([0.0] * heads + [-3.0] * heads),
        "attention_weight": torch.tensor([1.0] * heads + [0.5] * heads),
    }


def log_attention(attention: Tensor) -> Tensor:
    """fp32 natural logarithm of attention probabilities, finite also where there is none."""
    return (attention.float() + _SMALLEST).log()


def token_features(keys: Tensor, values: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """What the network reads of each token.

    Args:
        keys, values: ``[B, Hkv, T, d]``, keys un-rotated.
        attention: ``[B, Hkv, T]``, root mean square of the attention that the context's own queries give the token from
            behind the context (``reference.matching.full_attention``).

    Returns:
        ``(features [B, T, SelectorConfig.features], log_attention [B, Hkv, T])``, fp32.
    """
    batch, _, tokens, _ = keys.shape
    keys, values = keys.float(), values.float()
    logs = log_attention(attention)
    norms = [(x.norm(dim=-1) + 1e-6).log() for x in (keys, values)]
    figures = torch.stack([*norms, logs + math.log(tokens)], -1)
    place = torch.arange(tokens, dtype=torch.float32, device=keys.device)
    place = torch.stack([(tokens - place).log(), (place + 1).log()], -1).expand(batch, tokens, 2)
    parts = [x.transpose(1, 2).reshape(batch, tokens, -1) for x in (keys, values, figures)]
    return torch.cat([*parts, place], -1), logs


class TokenReader(LayerNetworks):
    """Networks that read tokens, each with its neighbours; arguments and files as for :class:`LayerNetworks`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for layer in self.layers:  # what features are measured in is set once, not learned
            layer["mean"].requires_grad_(False)
            layer["deviation"].requires_grad_(False)

    def read(self, layer_idx: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's network makes of :func:`token_features`.

        Returns:
            ``(measured [B, T, features], hidden [B, T, hidden])``: the features with mean 0 and deviation 1 in texts like
            those of the training, and what the network knows of each token.
        """
        p, config = self.layers[layer_idx], self.config
        measured = (features - p["mean"]) / p["deviation"]
        x = F.gelu(F.linear(measured, p["in_weight"], p["in_bias"]))
        near = F.conv1d(
            x.transpose(1, 2), p["mix_weight"][:, None], padding=config.kernel // 2, groups=config.hidden
        ).transpose(1, 2)
        return measured, x + F.gelu(F.linear(near, p["mid_weight"], p["mid_bias"]))

    @classmethod
    def load(cls, path: str | os.PathLike, spec: ModelSpec | None = None, check_weights: bool = True) -> "TokenReader":
        """Reads what ``save`` wrote, in fp32 whatever the file's dtype; see :meth:`LayerNetworks.load`."""
        return super().load(path, spec, check_weights).float()


class TokenSelector(TokenReader):
    """The network for every compacted layer of one model; arguments and files as for :class:`LayerNetworks`."""

    file_format = "kvcompact-selector"
    config_type = SelectorConfig
    shapes = staticmethod(_shapes)
    start = staticmethod(_start)

    def __init__(self, config: SelectorConfig, num_layers: int, *args: Any, **kwargs: Any):
        if config.shares is not None and len(config.shares) != num_layers:
            raise ValueError(f"shares must have a row for each of the {num_layers} layers, got {len(config.shares)}")
        super().__init__(config, num_layers, *args, **kwargs)

    @property
    def head_shares(self) -> HeadShares | None:
        """The config's shares; None where all heads get the same."""
        return self.config.shares and HeadShares(self.config.shares, self.fingerprint, self.info)

    def forward(self, layer_idx: int, features: Tensor, log_attention: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the attention that each token is expected to get in compacted layer ``layer_idx``.

        Args:
            features, log_attention: from :func:`token_features`.

        Returns:
            ``(continuation, recall)``, fp32 ``[B, Hkv, T]`` each: from queries of the text that follows, and from questions.
        """
        p, config = self.layers[layer_idx], self.config
        _, x = self.read(layer_idx, features)
        out = F.linear(x, p["out_weight"], p["out_bias"]).transpose(1, 2)
        out = out + p["attention_weight"][:, None] * torch.cat([log_attention, log_attention], 1)
        return out[:, : config.num_kv_heads], out[:, config.num_kv_heads :]

    def scores(
        self, layer_idx: int, keys: Tensor, values: Tensor, attention: Tensor, recall_weight: float | None = None
    ) -> Tensor:
        """Scores to keep tokens by, fp32 ``[B, Hkv, T]``: the logarithm of both kinds of attention together.

        Args:
            keys, values, attention: as for :func:`token_features`.
            recall_weight: above 0; None takes the config's.
        """
        features, log_attention = token_features(keys, values, attention)
        continuation, recall = self(layer_idx, features, log_attention)
        own = log_attention - log_attention.logsumexp(-1, keepdim=True) + continuation.logsumexp(-1, keepdim=True)
        continuation = torch.lerp(own, continuation, self.config.trust)
        weight = self.config.recall_weight if recall_weight is None else recall_weight
        return torch.logaddexp(continuation, recall + math.log(weight))
