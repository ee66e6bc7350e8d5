# SPDX-License-Identifier: Apache-2.0
"""The contract of a compaction method, and the registry that ``method="..."`` names them through."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..cache import CompactBlock
from ..model_spec import ModelSpec
from ..rope import Rope

if TYPE_CHECKING:
    from ..head_shares import HeadShares


@dataclass(frozen=True)
class LayerInput:
    """What a method sees of one layer, after that layer's prefill. No row is padded.

    Attributes:
        layer_idx, num_layers: index among, and number of, the layers that are compacted.
        keys, values: ``[B, Hkv, T, d]``, keys rotated as cached.
        queries: rotated queries of the last positions, ``[B, H, Tq, d]``, as many as the method asked for; None if none.
            With ``Method.prefill_passes == 2`` they are those of a second reading of the context, at positions
            ``T ... 2T - 1``, which sees all of the first.
        positions: int64 ``[T]``, the logical positions of the tokens.
        rope: the layer's rotary embedding.
        scale: factor on the logits.
        notes: what the method wrote there for earlier layers of the same reading; empty at the first.
    """

    layer_idx: int
    num_layers: int
    keys: Tensor
    values: Tensor
    queries: Tensor | None
    positions: Tensor
    rope: Rope
    scale: float
    notes: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]


@dataclass
class Method(ABC):
    """One way to compact a layer's cache; subclasses are dataclasses whose fields are the method's options.

    Class attributes:
        name: what ``method=`` takes.
        summary: one line for ``kvcompact methods``.
        source: paper and section.
        prefill_passes: 2 to read the context twice and see the second reading's queries.
        joins_layers: True when ``finish`` makes layers share what they hold.
        separate_heads: True when a head's slots come from that head's keys, values and queries alone, so that heads can be
            given unequal numbers of them: the method then has the option ``shares``, see :func:`get_method`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    prefill_passes: ClassVar[int] = 1
    joins_layers: ClassVar[bool] = False
    separate_heads: ClassVar[bool] = False

    @property
    def queries_needed(self) -> int:
        """Queries of the last so many positions that ``compact_layer`` wants: 0 for none, -1 for all."""
        return 0

    @property
    def min_slots(self) -> int:
        """The fewest slots that the method can work with."""
        return 1

    @property
    def whole_context_only(self) -> str | None:
        """Why the method cannot compact a running conversation part by part (``compact_over``); None when it can."""
        if self.prefill_passes != 1:
            return "reads the context twice"
        if self.joins_layers:
            return "lets layers share slots, to which nothing can be added"
        return None

    def settings(self) -> dict[str, Any]:
        """The options by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def with_shares(self, shares: "HeadShares | str | None") -> "Method":
        """This method with as many slots for each KV head as was measured (or as a file says); with None, with as many
        for all of them.

        Raises:
            ValueError: it has no ``separate_heads``.
        """
        if not self.separate_heads:
            raise ValueError(
                f"method must make each head's slots by themselves, and as many for each; {self.name!r} with these options does not"
            )
        if shares is None:
            return self
        from ._shares import WithShares  # which is a method itself

        return WithShares(self, shares)

    def prepare(self, spec: ModelSpec) -> None:
        """Called once per model before anything is compacted: load weights, check that the model fits."""

    def budgets(self, slots: int, num_tokens: int, num_layers: int) -> list[int]:
        """Slots of each compacted layer; their mean is ``slots``. The default gives every layer the same."""
        return [slots] * num_layers

    @abstractmethod
    def compact_layer(self, layer: LayerInput, slots: int) -> CompactBlock:
        """The layer's block: ``slots`` slots per KV head on average, from ``layer.num_tokens`` >= slots tokens."""

    def finish(self, blocks: list[CompactBlock]) -> list[CompactBlock]:
        """The blocks of all compacted layers, once they are there; a method with ``joins_layers`` may return others."""
        return blocks


def layer_budgets(method: Method, slots: int, num_tokens: int, num_layers: int) -> list[int]:
    """``method.budgets(...)``, checked.

    Raises:
        ValueError: it is not one int in ``[1, num_tokens]`` for each layer.
    """
    name = type(method).__name__
    budgets = list(method.budgets(slots, num_tokens, num_layers))
    if len(budgets) != num_layers:
        raise ValueError(f"{name}.budgets must return {num_layers} numbers, got {len(budgets)}")
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= num_tokens:
            raise ValueError(f"{name}.budgets must return ints in [1, {num_tokens}], got {budget!r}")
    return budgets


def checked_block(method: Method, block: Any, layer: LayerInput, layer_idx: int) -> CompactBlock:
    """What ``method.compact_layer`` returned for the model's layer ``layer_idx``, in memory of its own.

    Raises:
        TypeError, ValueError: it is no block, does not fit the layer, leaves a head without slots, or is not finite.
    """
    who = f"{type(method).__name__}.compact_layer (layer {layer_idx})"
    if not isinstance(block, CompactBlock):
        raise TypeError(f"{who} must return a CompactBlock, got {type(block).__name__}")
    keys = layer.keys
    found = (block.batch_size, block.num_kv_heads, block.head_dim, block.keys.dtype, block.keys.device)
    wanted = (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype, keys.device)
    if found != wanted:
        raise ValueError(f"{who} must return (batch, KV heads, head dim, dtype, device) {wanted}, got {found}")
    if int(block.slot_counts.min()) < 1:
        raise ValueError(f"{who} returned a KV head without slots")
    if not (block.keys.isfinite().all() and block.values.isfinite().all()):
        raise ValueError(f"{who} returned keys or values that are NaN or infinite")
    if block.beta is not None and not (block.beta < float("inf")).all():
        raise ValueError(f"{who} returned a beta that is NaN or +inf")
    # slots of their own: a view would keep the whole context's keys alive
    for name in ("keys", "values"):
        x = getattr(block, name)
        if x.untyped_storage().nbytes() > x.numel() * x.element_size():
            block = replace(block, **{name: x.clone()})
    return block


def finished_blocks(method: Method, blocks: list[CompactBlock]) -> list[CompactBlock]:
    """``method.finish(blocks)``, checked.

    Raises:
        TypeError, ValueError: it is not one block for each layer, of the same batch, heads, dtype and device.
    """
    if not method.joins_layers:
        return blocks
    done = list(method.finish(list(blocks)))
    who = f"{type(method).__name__}.finish"
    if len(done) != len(blocks):
        raise ValueError(f"{who} must return {len(blocks)} blocks, got {len(done)}")
    for i, (new, old) in enumerate(zip(done, blocks)):
        if not isinstance(new, CompactBlock):
            raise TypeError(f"{who} must return CompactBlocks, got {type(new).__name__} for layer {i}")
        found, wanted = ((b.batch_size, b.num_kv_heads, b.head_dim, b.keys.dtype, b.keys.device) for b in (new, old))
        if found != wanted:
            raise ValueError(
                f"{who} must return (batch, KV heads, head dim, dtype, device) {wanted} for layer {i}, got {found}"
            )
    return done


SHARES = "shares"  # the option of every method with separate heads
_METHODS: dict[str, type[Method]] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known under ``cls.name``. A name can be registered once."""
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"register_method takes a class that derives from Method, got {cls!r}")
    for attribute in ("name", "summary", "source"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise TypeError(f"{cls.__name__}.{attribute} must be a string")
    if cls.name in _METHODS and _METHODS[cls.name] is not cls:
        raise ValueError(f"a method named {cls.name!r} is registered already: {_METHODS[cls.name].__qualname__}")
    _METHODS[cls.name] = cls
    return cls


def list_methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    return dict(sorted(_METHODS.items()))


def get_method(method: str | Method, **options) -> Method:
    """The method named ``method`` with the given options; a ``Method`` is returned as it is.

    Every method that has ``separate_heads`` takes ``shares``, the file of ``kvcompact train shares``: each KV head then gets as
    many slots as it was measured to need, at an equal number in all. None gives all heads the same.

    Raises:
        ValueError: no method of that name, or an option that its class refuses.
        TypeError: an option that the method does not have.
        FileNotFoundError, BadFileError: a file that an option names is not there, or is damaged.
    """
    if isinstance(method, Method):
        if options:
            raise TypeError(f"options {sorted(options)} were given with a ready {type(method).__name__}")
        return method
    if not isinstance(method, str):
        shown = "a Tensor" if isinstance(method, Tensor) else repr(method)  # whose values nobody wants to read
        raise TypeError(f"method must be a name or a Method with its options, got {shown}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, sorted(_METHODS)))}, got {method!r}")
    cls = _METHODS[method]
    allowed = option_names(cls)
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        hint = (
            ""
            if "__dataclass_fields__" in cls.__dict__
            else f" ({cls.__name__} is no dataclass: fields are options then)"
        )
        raise TypeError(
            f"method {method!r} has no option {', '.join(map(repr, unknown))}; its options are: "
            f"{', '.join(map(repr, allowed)) or 'none'}{hint}"
        )
    missing = [
        f.name
        for f in fields(cls)
        if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in options
    ]
    if missing:
        raise TypeError(f"method {method!r} needs the option {', '.join(map(repr, missing))}")
    shares = options.pop(SHARES, None) if cls.separate_heads else None
    made = cls(**options)
    return made if shares is None else made.with_shares(shares)


def option_names(cls: type[Method]) -> list[str]:
    """What :func:`get_method` takes for the class."""
    return [f.name for f in fields(cls) if f.init] + [SHARES] * cls.separate_heads
