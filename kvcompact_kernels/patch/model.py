# SPDX-License-Identifier: Apache-2.0
"""``patch_model``, ``unpatch_model`` and ``compact``: one model instance at a time, and everything can be undone."""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .._checks import check_choice, check_int
from ..backends.registry import backend_names
from ..cache import CompactCache
from ..methods import Method, get_method
from . import attention, compaction
from .attention import Route
from .families import cache_argument, cache_name, check_fingerprint, decoder, forward_names, model_spec
from .session import CompactSession

_STATE = "_kvcompact"
# before 5.16, candidates were rolled back by counting the ids given, and those are not the tokens of the cache
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_OLD_ASSISTANTS = _VERSION < (5, 16)
# whether checkpointed layers lose their cache without gradients, too
_CHECKPOINTS_ALWAYS = _VERSION < (5, 24)


@dataclass
class PatchState:
    """What ``unpatch_model`` needs, and what the patched methods look up on their model."""

    method: Method | None
    ratio: float | None
    slots: int | None
    compact_over: int | None
    backend: str
    config: Any
    own_config: Any
    previous: str
    # instance attributes that stood where the patched ones stand
    replaced: dict[str, Any] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    in_session: bool = False  # whether the pass that runs, or the last one, reads a compact cache


def patch_model(
    model: PreTrainedModel,
    method: str | Method = "snapkv",
    *,
    ratio: float | None = None,
    slots: int | None = None,
    compact_over: int | None = None,
    backend: str = "auto",
    **options: Any,
) -> PreTrainedModel:
    """Teaches one model instance to compact its KV cache; other instances, and the class, stay as they are.

    The model gains ``model.compact(input_ids, ...)``, and its forward pass and ``generate`` accept the
    :class:`CompactCache` that it returns as ``past_key_values`` or ``cache``, which are two names of one argument (the
    second is transformers' since 5.24; both are taken with every version). Without such a cache the model computes what it
    did before, bit for bit. Patching a patched model replaces its method and options.

    With ``compact_over`` an ordinary ``generate(prompt)`` compacts by itself: once after prefill when the prompt has more
    tokens, and again whenever more than that many tokens have gathered behind the slots (those become further slots). The
    first generated token, and all tokens until the first compaction, are exact.

    Args:
        model: of a supported family: Llama, Qwen2, Qwen3, Mistral, Gemma 3 (text).
        method: a name of ``list_methods()``, or a ``Method``.
        ratio, slots: default size of ``model.compact``: tokens per slot, or slots per KV head. Ratio 8 if neither is given.
        compact_over: tokens, or None: compact only on request.
        backend: of ``ops.compact_attention``: "auto" or a name.
        **options: of the method.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a model, method, option or size that cannot be used; the model is then unchanged.
        UnsupportedModelError: the model's family or a feature of it is not supported.

    ``copy.deepcopy`` and ``pickle`` of a patched model give a patched model of its own.
    """
    spec = model_spec(model)  # raises for everything that is not supported
    chosen = get_method(method, **options)
    ratio, slots = compaction.check_size(ratio, slots)
    _check_backend(backend)
    if compact_over is not None:
        check_int("compact_over", compact_over, minimum=1)
        compaction.check_compactable(spec)
        if chosen.whole_context_only:
            raise ValueError(
                f"compact_over cannot be used with method {chosen.name!r}, which {chosen.whole_context_only}: use model.compact"
            )
        if slots is not None and slots > compact_over:
            raise ValueError(f"slots must be at most compact_over ({compact_over}), got {slots}")
    if is_patched(model):
        unpatch_model(model)
    return _patch(model, chosen, ratio, slots, compact_over, backend)


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`patch_model` and returns the model.

    Raises:
        ValueError: the model is not patched.
    """
    state = _state(model)
    for hook in state.hooks:
        hook.remove()
    _follow_implementation(state, state.own_config)
    # what was set on the config in the meantime stays set
    hidden = ("_attn_implementation", "_attn_implementation_internal")
    state.config.__dict__.update({k: v for k, v in state.own_config.__dict__.items() if k not in hidden})
    if state.config._attn_implementation != state.previous:
        state.config._attn_implementation = state.previous
    _swap_config(model, state.own_config, state.config)
    for name in ("generate", "compact"):
        model.__dict__.pop(name, None)
    model.__dict__.update(state.replaced)
    del model.__dict__[_STATE]
    return model


def is_patched(model: Any) -> bool:
    """Whether ``patch_model`` has been applied to this instance."""
    return isinstance(model, nn.Module) and _STATE in model.__dict__


def compact(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: str | Method | None = None,
    *,
    attention_mask: Tensor | None = None,
    ratio: float | None = None,
    slots: int | None = None,
    progress: bool = False,
    **options: Any,
) -> CompactCache:
    """Reads a context and returns it as a compact cache.

    Args:
        model: of a supported family, patched or not (then it is patched for the duration of the call).
        input_ids: ``[B, T]``; rows of unequal length with padding and ``attention_mask``, compacted row by row.
        method: a name or ``Method``; None takes the patched model's, or "snapkv".
        attention_mask: ``[B, T]``, 0 at padding (on any side).
        ratio: tokens per slot: each row gets ``ceil(tokens / ratio)`` slots per KV head and layer on average.
        slots: slots per KV head and layer on average, instead of ``ratio``; at most the tokens of the shortest row.
            With neither, what ``patch_model`` was given, else ratio 8.
        progress: shows a progress bar.
        **options: of the method.

    Returns:
        CompactCache: of logical length T, or of the longest row without padding.

    Raises:
        TypeError, ValueError: bad arguments, a context shorter than ``slots``, NaN in the model's keys or values.
        UnsupportedModelError: the model is not supported, or has nothing to compact.

    Peak memory holds the keys and values of one layer, not of all (all of them for methods that read the context twice).
    """
    spec = model_spec(model)
    state = _state(model) if is_patched(model) else None
    if method is None:
        if state is not None and state.method is not None and not options:
            chosen = state.method
        else:
            chosen = get_method("snapkv" if state is None or state.method is None else state.method.name, **options)
    else:
        chosen = get_method(method, **options)
    if ratio is None and slots is None and state is not None:
        ratio, slots = state.ratio, state.slots
    ratio, slots = compaction.check_size(ratio, slots)
    if state is not None:
        return compaction.run_compaction(model, spec, chosen, input_ids, attention_mask, ratio, slots, progress)
    _patch(model, None, None, None, None, "auto")
    try:
        return compaction.run_compaction(model, spec, chosen, input_ids, attention_mask, ratio, slots, progress)
    finally:
        unpatch_model(model)


def _patch(
    model: PreTrainedModel,
    method: Method | None,
    ratio: float | None,
    slots: int | None,
    compact_over: int | None,
    backend: str,
) -> PreTrainedModel:
    attention.register()
    config = model.config
    # a config of its own: another model may share the object
    own = copy.copy(config)
    own._attn_implementation = attention.NAME
    state = PatchState(method, ratio, slots, compact_over, backend, config, own, config._attn_implementation)
    _swap_config(model, config, own)
    base = decoder(model)
    state.hooks.append(base.register_forward_pre_hook(functools.partial(_before, state), with_kwargs=True))
    state.hooks.append(base.register_forward_hook(_after, with_kwargs=True, always_call=True))
    head = model.get_output_embeddings()
    if head is not None:
        state.hooks.append(head.register_forward_pre_hook(functools.partial(_before_head, state)))
    model.__dict__[_STATE] = state
    # partial, not a closure or a bound method: deepcopy and pickle give the copy a function of its own
    for name, function in (("generate", _generate), ("compact", _compact)):
        if name == "compact" or hasattr(model, "generate"):
            if name in model.__dict__:
                state.replaced[name] = model.__dict__[name]
            model.__dict__[name] = functools.partial(function, model)
    return model


def _swap_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.__dict__["config"] = new


def _follow_implementation(state: PatchState, config: Any) -> None:
    """After ``model.set_attn_implementation`` ordinary passes use what it named, and compact caches are still attended to."""
    if config._attn_implementation != attention.NAME:
        state.previous = config._attn_implementation
        config._attn_implementation = attention.NAME


def _state(model: Any) -> PatchState:
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not patched: call patch_model first")
    return model.__dict__[_STATE]


def _check_backend(backend: Any) -> None:
    check_choice("backend", backend, ("auto", *backend_names("compact_attention")))


def new_session(model: PreTrainedModel, state: PatchState, cache: CompactCache | None = None) -> CompactSession:
    """A session of a patched model (or its decoder stack) on a cache; with ``compact_over`` it compacts its own tail.

    Raises:
        ValueError: a cache of another model, or on another device or of another dtype.
    """
    spec = model_spec(model)
    if cache is not None:
        check_fingerprint(cache, model, "past_key_values")
        weight = model.get_input_embeddings().weight
        if cache.device != weight.device or cache.dtype != weight.dtype:
            raise ValueError(
                f"past_key_values is {cache.dtype} on {cache.device}, the model is {weight.dtype} on {weight.device}: "
                "use cache.to(device, dtype)"
            )
    compactor = None
    if state.compact_over is not None:
        state.method.prepare(spec)
        compactor = compaction.Compactor(model, spec, state.method, state.ratio, state.slots, state.compact_over)
    return CompactSession(spec, cache, compactor)


def _given_cache(arguments: dict[str, Any]) -> Any:
    """Takes the cache out of keyword arguments: ``cache`` and ``past_key_values`` are one thing, whatever transformers' version.

    Raises:
        ValueError: both are given.
    """
    cache, past_key_values = (arguments.pop(name, None) for name in ("cache", "past_key_values"))
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def _before(state: PatchState, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-hook of the decoder stack: makes the session, and the mask and positions that belong to it."""
    kwargs = {**dict(zip(forward_names(type(base)), args)), **kwargs}
    _follow_implementation(state, base.config)
    past = _given_cache(kwargs)
    if isinstance(past, CompactCache):
        past = new_session(base, state, past)
    kwargs.update(cache_argument(base, past))
    route = kwargs["kvcompact"] = Route(state.previous, state.backend)
    state.in_session = isinstance(past, CompactSession)
    if not isinstance(past, CompactSession):
        attention.begin_pass(state.previous)
        return (), kwargs
    attention.begin_pass("sdpa")
    if kwargs.get("output_attentions") or getattr(base.config, "output_attentions", False):
        raise ValueError("output_attentions does not work with a compact cache: attention weights are never in memory")
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        raise TypeError(f"input_ids or inputs_embeds must be a tensor, got {type(tokens).__name__}")
    if past.chunk_size is not None and tokens.shape[1] > past.chunk_size:
        tokens = _read_in_chunks(base, past, kwargs)
        attention.begin_pass("sdpa")
    batch, new = tokens.shape[:2]
    if new == 0:
        raise ValueError("there are no new tokens: a compact cache does not hold the logits of its last token")
    route.session = past
    checkpointed = base.training and bool(getattr(base.layers[0], "gradient_checkpointing", False))
    route.detached = checkpointed and (_CHECKPOINTS_ALWAYS or torch.is_grad_enabled())
    kwargs["attention_mask"] = past.begin(
        kwargs.get("attention_mask"), batch, new, tokens.device, store=not (route.detached or past.functional)
    )
    route.columns = past.columns
    if kwargs.get("position_ids") is None and past.columns is not None:
        kwargs["position_ids"] = past.positions(new)
    return (), kwargs


def _read_in_chunks(base: nn.Module, session: CompactSession, kwargs: dict[str, Any]) -> Tensor:
    """Reads all but the last chunk of the new tokens, and leaves that one in ``kwargs``."""
    name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
    size, tokens, mask = session.chunk_size, kwargs[name], kwargs.get("attention_mask")
    done, total = 0, tokens.shape[1]
    before = 0 if mask is None else mask.shape[1] - total  # columns of the mask that stand for older tokens
    while done < total:
        end = min(done + size, total)
        part = {**kwargs, name: tokens[:, done:end]}
        if mask is not None:
            part["attention_mask"] = mask[:, : before + end] if before else mask[:, done:end]
        for per_token in ("position_ids", "cache_position"):
            if kwargs.get(per_token) is not None:
                part[per_token] = kwargs[per_token][..., done:end]
        if end == total:
            kwargs.update(part)
        else:
            base(**part)
        done = end
    return kwargs[name]


def _after(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    attention.end_pass()
    past = kwargs.get(cache_name(base))
    if isinstance(past, CompactSession):
        past.end()


def _before_head(state: PatchState, head: nn.Module, args: tuple) -> tuple:
    """Pre-hook of the output embeddings. ``generate`` hands them the last position of each prompt, a slice with gaps, for
    which torch's ``linear`` multiplies row by row, with a copy of the whole weight per row on a CPU."""
    if not state.in_session or not args or not isinstance(args[0], Tensor):
        return args  # without a compact cache nothing is computed otherwise than before
    return args[0].contiguous(), *args[1:]


def _compact(
    self: PreTrainedModel,
    input_ids: Tensor,
    method: str | Method | None = None,
    *,
    attention_mask: Tensor | None = None,
    ratio: float | None = None,
    slots: int | None = None,
    progress: bool = False,
    **options: Any,
) -> CompactCache:
    """``model.compact``: see :func:`compact`."""
    return compact(
        self,
        input_ids,
        method,
        attention_mask=attention_mask,
        ratio=ratio,
        slots=slots,
        progress=progress,
        **options,
    )


def _generate(
    self: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``model.generate`` of a patched model: transformers' own, and it takes compact caches.

    Args:
        inputs: the new tokens ``[B, q]``; or the full prompt, recognised by a context whose ids are those that were
            compacted. What follows the compact cache may be left-padded (``attention_mask [B, q]``).
        past_key_values: (or ``cache``, its name since transformers 5.24; both are taken) a ``CompactCache`` (never changed;
            with batch size 1 it serves any number of questions), or the ``CompactSession`` of an earlier call, continued;
            or anything that transformers takes.
        **kwargs: transformers' generate arguments.
    """
    state = _state(self)
    original = state.replaced.get("generate") or functools.partial(type(self).generate, self)
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    given = session = _given_cache(kwargs)
    if not isinstance(session, (CompactCache, Cache, tuple, type(None))):
        raise TypeError(
            f"past_key_values must be a CompactCache or a cache of transformers, got {type(session).__name__}"
            " (CompactCache.load reads a file, CompactCache.compose joins several)"
        )
    if isinstance(session, CompactCache):
        session = new_session(self, state, session)
    elif session is None and state.compact_over is not None and not _forbids_session(kwargs):
        session = new_session(self, state)
    if not isinstance(session, CompactSession):
        with attention.masks_of(state.previous):
            return original(
                inputs, generation_config, *args, attention_mask=attention_mask, **cache_argument(self, given), **kwargs
            )
    embeds = kwargs.get("inputs_embeds")
    source = ids if embeds is None else embeds
    if not isinstance(source, Tensor) or source.ndim != (2 if embeds is None else 3):
        raise ValueError("inputs must be a tensor [batch, tokens] of ids (or inputs_embeds [batch, tokens, hidden])")
    config = generation_config if generation_config is not None else self.generation_config
    copies = 1
    for name in ("num_beams", "num_return_sequences"):
        value = kwargs.get(name, getattr(config, name, None))
        copies = max(copies, value or 1)
    batch, past = source.shape[0], session.get_seq_length()
    session.check_batch(batch)
    new = source.shape[1]
    full = embeds is None and _is_full_prompt(given, ids, attention_mask, past)
    if full:
        new -= past
    if new < 1:
        raise ValueError("inputs hold no new tokens: a compact cache does not hold the logits of its last token")
    assisted = kwargs.get("assistant_model") is not None or kwargs.get(
        "prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None)
    )
    if assisted:
        for layer in session.layers:
            if layer.is_sliding:
                layer.activate_past_recording()
    if assisted and past and _OLD_ASSISTANTS:
        raise ValueError(
            "generation with an assistant or prompt lookup on a compact cache needs transformers >= 5.16, this is "
            f"{transformers.__version__}"
        )
    mask = session.generation_mask(attention_mask, batch, new, source.device)
    if copies > 1:
        session.batch_repeat_interleave(copies)
    if embeds is not None and past:
        # transformers slices embeddings of the whole sequence; those of the context are never read
        kwargs["inputs_embeds"] = torch.cat([embeds.new_zeros(1, 1, 1).expand(batch, past, embeds.shape[2]), embeds], 1)
    if past and embeds is None and hasattr(self, "_get_initial_cache_position"):  # transformers 4
        kwargs.setdefault("cache_position", torch.arange(past, past + new, device=ids.device))
    size = kwargs.pop("prefill_chunk_size", None) or getattr(config, "prefill_chunk_size", None)
    if size is not None:
        session.chunk_size = check_int("prefill_chunk_size", size, minimum=1)
    # read in chunks by the pre-hook: transformers' own chunks need an empty cache in some versions
    configs = [c for c in (generation_config, self.generation_config) if getattr(c, "prefill_chunk_size", None)]
    sizes = [c.prefill_chunk_size for c in configs]
    for c in configs:
        c.prefill_chunk_size = None
    try:
        with attention.masks_of("sdpa"):
            return original(
                inputs, generation_config, *args, attention_mask=mask, **cache_argument(self, session), **kwargs
            )
    finally:
        session.chunk_size = None
        for c, old in zip(configs, sizes):
            c.prefill_chunk_size = old


def _forbids_session(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for a cache of another kind, or for none."""
    return (
        not kwargs.get("use_cache", True)
        or kwargs.get("cache_implementation") is not None
        or kwargs.get("assistant_model") is not None
    )


def _is_full_prompt(cache: Any, ids: Tensor, attention_mask: Tensor | None, past: int) -> bool:
    """Whether the ids begin with the very context that the cache was made from."""
    if not isinstance(cache, CompactCache) or ids.shape[1] <= past:
        return False
    known = cache.info.get("context_digest")
    if not isinstance(known, list) or len(known) not in (1, ids.shape[0]):
        return False
    context = ids[:, :past]
    lengths = cache.lengths.tolist() if cache.lengths is not None else [past] * len(known)
    for row in range(ids.shape[0]):
        which = row if len(known) > 1 else 0
        if compaction.context_digest(context[row, past - lengths[which] :]) != known[which]:
            return False
    return True
