# SPDX-License-Identifier: Apache-2.0
"""The supported model families, and what is read from a live model: sizes, layer kinds, rotary embeddings, fingerprint."""

import functools
import hashlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..cache import CompactCache
from ..model_spec import ModelSpec, UnsupportedModelError, fingerprint_differences
from ..rope import Rope

# model_type -> how messages name the family. All of them rotate in rotate_half convention and hand their attention to
# transformers' attention interface with the rotated, cached keys.
FAMILIES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma3_text": "Gemma 3 (text)",
}
# where PEFT, torch.compile and DataParallel keep the model that they wrap
_WRAPPERS = {
    "get_base_model()": lambda model: model.get_base_model() if hasattr(model, "get_base_model") else None,
    "_orig_mod": lambda model: getattr(model, "_orig_mod", None),
    "module": lambda model: getattr(model, "module", None),
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

_ROPE_FIELDS = (
    "rope_type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder stack inside a model with a head, or the model itself."""
    # not model.base_model: Gemma 3's prefix does not name it in transformers 4
    return model if hasattr(model, "layers") else getattr(model, "model", model)


@functools.cache
def forward_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward pass, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def cache_name(model: nn.Module) -> str:
    """What the model's forward pass calls its cache, and its output's field: "past_key_values", since transformers 5.24 "cache"."""
    return "cache" if "cache" in forward_names(type(model)) else "past_key_values"


def cache_argument(model: nn.Module, past: Any) -> dict[str, Any]:
    """``past`` as keyword argument of the model's forward pass or ``generate``; nothing if it is None."""
    return {} if past is None else {cache_name(model): past}


def read_tokens(model: PreTrainedModel, ids: torch.Tensor, past: Any, use_cache: bool = True, **options: Any) -> Any:
    """One forward pass of the decoder stack, without the vocabulary projection, over ``ids`` behind a cache or None."""
    base = decoder(model)
    return base(input_ids=ids, use_cache=use_cache, **cache_argument(base, past), **options)


def model_spec(model: PreTrainedModel) -> ModelSpec:
    """The model's description; its ropes are the rotary modules' buffers as they are now.

    Raises:
        TypeError: not a transformers model.
        UnsupportedModelError: a family, rope type or feature that is not supported.
    """
    config, base = _supported(model)
    attentions = [layer.self_attn for layer in base.layers]
    first = attentions[0]
    num_kv_heads = config.num_key_value_heads
    spec = ModelSpec(
        family=config.model_type,
        num_layers=len(attentions),
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=first.head_dim,
        layer_kinds=_layer_kinds(config, len(attentions)),
        scales=tuple(float(attention.scaling) for attention in attentions),
        ropes=read_ropes(model),
        sliding_window=getattr(config, "sliding_window", None),
    )
    spec.fingerprint.update(_fingerprint(spec, config, base))
    return spec


def read_ropes(model: PreTrainedModel) -> dict[str, Rope]:
    """Layer kind -> rotary embedding, from the rotary modules' current buffers (dynamic scaling changes them)."""
    base = decoder(model)
    rotary = base.rotary_emb
    if isinstance(rotary.rope_type, dict):  # Gemma 3 since transformers 5: one set of buffers per layer type
        kinds = {"full_attention": "full", "sliding_attention": "sliding"}
        return {
            kind: _rope(
                getattr(rotary, f"{name}_inv_freq"),
                getattr(rotary, f"{name}_attention_scaling", 1.0),
                rotary.rope_type[name],
            )
            for name, kind in kinds.items()
            if name in rotary.rope_type
        }
    full = _rope(rotary.inv_freq, rotary.attention_scaling, rotary.rope_type)
    local = getattr(base, "rotary_emb_local", None)  # Gemma 3 before transformers 5
    if local is None:
        return {"full": full, "sliding": full}
    return {"full": full, "sliding": _rope(local.inv_freq, local.attention_scaling, local.rope_type)}


def check_fingerprint(
    cache: CompactCache, model: PreTrainedModel, where: str = "the cache", check_weights: bool = True
) -> dict[str, Any]:
    """Raises ValueError unless the cache was made by this model; returns the model's own fingerprint.

    Args:
        where: what the message calls the cache: its file, or an argument.
        check_weights: False takes the cache of a fine-tuned sibling, too.
    """
    wanted = model_spec(model).fingerprint
    different = fingerprint_differences(cache.fingerprint, wanted, check_weights)
    if different:
        raise ValueError(f"{where} was made by another model: {'; '.join(different)}")
    return wanted


def _supported(model: Any) -> tuple[Any, nn.Module]:
    """The config and the base model (the decoder stack) of a supported model."""
    if not isinstance(model, PreTrainedModel):
        inner = [name for name, get in _WRAPPERS.items() if isinstance(get(model), PreTrainedModel)]
        hint = f", which wraps one: give model.{inner[0]} instead" if inner else ""
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    config, base = model.config, decoder(model)
    supported = ", ".join(f"{name} ({kind})" for kind, name in FAMILIES.items())
    if getattr(config, "model_type", None) not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}) is not supported; "
            f"supported are {supported}"
        )
    if not hasattr(base, "layers") or not hasattr(base, "rotary_emb"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers with rotary embeddings; supported are {supported}"
        )
    if len(base.layers) == 0:
        raise UnsupportedModelError(f"{type(model).__name__} has no layers")
    features = {
        "attention logit soft-capping": getattr(config, "attn_logit_softcapping", None) is not None,
        "bidirectional attention": bool(getattr(config, "use_bidirectional_attention", False))
        or getattr(config, "is_causal", True) is False,
        "attention sinks": any(hasattr(layer.self_attn, "sinks") for layer in base.layers),
    }
    used = [name for name, present in features.items() if present]
    rope_types = base.rotary_emb.rope_type
    rope_types = rope_types.values() if isinstance(rope_types, dict) else [rope_types]
    used += [f"RoPE of type {t!r}" for t in rope_types if t not in ROPE_TYPES]
    if used:
        raise UnsupportedModelError(
            f"{type(model).__name__} uses {', '.join(used)}, which is not supported; supported are {supported} with RoPE "
            f"of the types {', '.join(map(repr, ROPE_TYPES))}"
        )
    return config, base


def _layer_kinds(config: Any, num_layers: int) -> tuple[str, ...]:
    if config.model_type == "mistral":  # one window for all layers, or none
        return ("full" if config.sliding_window is None else "sliding",) * num_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    kinds = {"full_attention": "full", "sliding_attention": "sliding"}
    unknown = sorted(set(types) - kinds.keys())
    if unknown:
        raise UnsupportedModelError(f"layers of the type {', '.join(map(repr, unknown))} are not supported")
    return tuple(kinds[name] for name in types[:num_layers])


def _rope(inv_freq: torch.Tensor, attention_scaling: float, rope_type: str) -> Rope:
    return Rope(inv_freq.detach().to(torch.float32).clone(), float(attention_scaling), rope_type)


def _fingerprint(spec: ModelSpec, config: Any, base: nn.Module) -> dict[str, Any]:
    return {
        "family": spec.family,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "layer_kinds": list(spec.layer_kinds),
        "sliding_window": spec.sliding_window,
        "rope": _rope_parameters(config),
        "weights": _weight_digest(base),
    }


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The config's rope entries, in one form for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        parameters = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
        if config.model_type == "gemma3_text":
            local = {"rope_theta": config.rope_local_base_freq}
            parameters = {"full_attention": parameters, "sliding_attention": local}
    if any(isinstance(value, dict) for value in parameters.values()):
        return {name: _rope_entry(value, config) for name, value in sorted(parameters.items()) if value is not None}
    return _rope_entry(parameters, config)


def _rope_entry(parameters: dict[str, Any], config: Any) -> dict[str, Any]:
    entry = {name: parameters[name] for name in _ROPE_FIELDS if parameters.get(name) is not None}
    entry["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    if entry["rope_type"] in ("yarn", "llama3", "dynamic"):
        entry.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return {name: float(v) if isinstance(v, (int, float)) else v for name, v in sorted(entry.items())}


def _weight_digest(base: nn.Module) -> str:
    """Hash of a sample of the weights, rounded to bf16 so that fp32 and bf16 loads of one model agree."""
    first, last = base.layers[0].self_attn, base.layers[-1].self_attn
    modules = [base.embed_tokens, base.norm]
    modules += [module for part in (first, last) for module in (part.q_proj, part.k_proj, part.v_proj, part.o_proj)]
    samples = []
    for weight in [x for module in modules for x in _weights(module)] + _adapters(base):
        if weight.device.type == "meta":
            raise ValueError("the model's weights are on the meta device: load them first")
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 512)][:512]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        samples.append(sample.contiguous().view(torch.uint8).to(modules[0].weight.device))
    # one copy from the device, for this runs before the first token of every request
    return hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).hexdigest()[:32]


def _weights(module: nn.Module) -> list[torch.Tensor]:
    """The module's weight, or what a quantised module without one holds instead (``qweight``, scales, ...)."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return [weight]
    found = dict(sorted([*module.named_parameters(), *module.named_buffers()]))
    found.pop("bias", None)
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__module__}.{type(module).__name__} shows no weights, by which caches of this model could be told "
            "from others'; models quantised in this way are not supported"
        )
    return list(found.values())


def _adapters(base: nn.Module) -> list[torch.Tensor]:
    """Weights of the active PEFT adapters in the first and the last module that has any: they change keys and values."""
    adapted = [
        module
        for module in base.modules()
        if hasattr(module, "adapter_layer_names") and not getattr(module, "disable_adapters", False)
    ]
    found = []
    for module in adapted[:1] + adapted[1:][-1:]:
        for name in module.adapter_layer_names:
            held = getattr(module, name, {})
            for adapter in module.active_adapters:
                if adapter in held:
                    part = held[adapter]
                    found += part.parameters() if isinstance(part, nn.Module) else [part]
    return found
