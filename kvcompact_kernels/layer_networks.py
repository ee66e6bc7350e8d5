# SPDX-License-Identifier: Apache-2.0
"""What trained networks share that have one set of parameters per compacted layer of one model: construction and files."""

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import BadFileError, check_int
from .cache import load_safetensors, save_safetensors
from .model_spec import ModelSpec, fingerprint_differences


class LayerNetworks(nn.Module, ABC):
    """Parameters for every compacted layer of one model, to train, save and load. Files are safetensors.

    Class attributes:
        file_format, file_version: name and newest version of the header.
        config_type: dataclass of the options; ``to_dict`` gives its fields.

    Args:
        config: options, the same for all layers.
        num_layers: number of compacted layers (sliding-window layers are not).
        fingerprint: of the model (``ModelSpec.fingerprint``); the parameters are of no use to another one.
        info: JSON-able notes that travel with the file (training steps, data, figures).
        generator: of the initialisation.
    """

    file_format: ClassVar[str]
    file_version: ClassVar[int] = 1
    config_type: ClassVar[type]

    def __init__(
        self,
        config: Any,
        num_layers: int,
        fingerprint: dict[str, Any],
        info: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_int("num_layers", num_layers, minimum=1)
        self.config, self.fingerprint, self.info = config, dict(fingerprint), dict(info or {})
        self.layers = nn.ModuleList(nn.ParameterDict(self.start(config, generator)) for _ in range(num_layers))

    @staticmethod
    @abstractmethod
    def shapes(config: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of one layer, in order."""

    @staticmethod
    @abstractmethod
    def start(config: Any, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The initial parameters of one layer, by name."""

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Writes parameters, config and fingerprint to one safetensors file, atomically.

        Args:
            dtype: of the parameters in the file; None is their own, bf16 halves it.
        """
        header = {
            "format": self.file_format,
            "version": self.file_version,
            "config": self.config.to_dict(),
            "num_layers": len(self.layers),
            "fingerprint": self.fingerprint,
            "info": self.info,
        }
        tensors = {name: x if dtype is None else x.to(dtype) for name, x in self.named_parameters()}
        save_safetensors(Path(path), tensors, {self.file_format: json.dumps(header)})

    @classmethod
    def load(
        cls, path: str | os.PathLike, spec: ModelSpec | None = None, check_weights: bool = True
    ) -> "LayerNetworks":
        """Reads what :meth:`save` wrote.

        Args:
            spec: of the model that will use it, which must be the one that it was trained for; None skips the check.
            check_weights: False takes a fine-tuned sibling of the model, too.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or damaged, of a newer format or for another model.
        """
        header, tensors = load_safetensors(path, cls.file_format, cls.file_version)
        try:
            config = cls.config_type(**header["config"])
            shapes = cls.shapes(config)
            wanted = {f"layers.{i}.{n}": s for i in range(header["num_layers"]) for n, s in shapes.items()}
            found = {name: tuple(x.shape) for name, x in tensors.items()}
            if wanted != found:
                wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
                raise ValueError(f"{len(wrong)} tensors do not fit its config, {wrong[0]} the first")
            if not all(x.isfinite().all() for x in tensors.values()):
                raise ValueError("its parameters hold NaN or infinities")
            made = cls(config, header["num_layers"], header["fingerprint"], header["info"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFileError(f"{path} is damaged: {error}") from error
        made.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        if spec is not None:
            made.check_model(spec, f"{path}", check_weights)
        return made

    def check_model(self, spec: ModelSpec, where: str = "the compactor", check_weights: bool = True) -> None:
        """Raises ValueError unless these are parameters for the model of ``spec``.

        Args:
            check_weights: False takes a fine-tuned sibling of the model, too.
        """
        different = fingerprint_differences(self.fingerprint, spec.fingerprint, check_weights)
        compacted = spec.layer_kinds.count("full")
        if compacted != len(self.layers):
            different.append(f"it has {len(self.layers)} layers, the model {compacted} to compact")
        if different:
            raise ValueError(f"{where} was trained for another model: {'; '.join(different)}")
