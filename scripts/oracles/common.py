# SPDX-License-Identifier: Apache-2.0
"""What the comparisons share: a model, an input, and what a method sees of it."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompact_kernels import compact
from kvcompact_kernels.cache import CompactBlock
from kvcompact_kernels.methods import LayerInput, Method


def add_model_argument(parser: argparse.ArgumentParser, tokens: int = 384) -> None:
    """--model, --tokens."""
    parser.add_argument("--model", help="a model folder; default: a random Llama")
    parser.add_argument("--tokens", type=int, default=tokens)


@dataclass
class Recorder(Method):
    """Keeps what methods are given, layer by layer."""

    name, summary, source = "recorder", "keeps the layers", "none"

    def __post_init__(self):
        self.layers: list[LayerInput] = []

    @property
    def queries_needed(self) -> int:
        return -1

    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        self.layers.append(layer)
        return CompactBlock(layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone())


def read_layers(model: Any, ids: Tensor) -> list[LayerInput]:
    """What a method that wants all queries is given of each layer."""
    recorder = Recorder()
    compact(model, ids, recorder, slots=1)
    return recorder.layers


def tiny_llama() -> Any:
    """Four layers, 8 query heads on 2 KV heads of 16, float64, weights large enough for uneven attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.double().eval()


def load(folder: str | None, tokens: int) -> tuple[Any, Tensor]:
    """The model with eager attention, and ids ``[1, tokens]`` of Python's language reference; or random ones of both."""
    if folder is None:
        return tiny_llama(), torch.randint(0, 101, (2, tokens), generator=torch.Generator().manual_seed(1))
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    text = " ".join(topics.values())[: 20 * tokens]
    return model.eval(), AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :tokens]
