# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs, and why not the others.

Every op registers its backends in order of preference. A backend's ``supports`` and ``run`` take the op's normalised
arguments; ``supports`` returns None when the backend can run them, else the reason why it cannot. ``declines``, where a
backend has one, returns the reason why it does not take a call that it could run unless it is asked for by name.
``backward``, where a backend has one, takes the gradients, the outputs and the same arguments. ``run_layers``, where a backend
has one, takes a list of such arguments, one a layer, and serves them together; the op says what it returns.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run these inputs; the message says why."""


@dataclass(frozen=True)
class Backend:
    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]
    declines: Callable[..., str | None] | None = None
    backward: Callable[..., Any] | None = None
    run_layers: Callable[..., Any] | None = None

    def refusal(self, args: tuple) -> str | None:
        """Why ``"auto"`` does not take this backend for these arguments, or None."""
        return self.supports(*args) or (self.declines(*args) if self.declines else None)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns: the chosen backend, and for each other one the reason why it was not taken."""

    op: str
    chosen: str | None
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend can run this'}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


_BACKENDS: dict[str, list[Backend]] = {}
_NORMALISE: dict[str, Callable[..., tuple]] = {}


def register(op: str, normalise: Callable[..., tuple], backends: list[Backend]) -> None:
    """Registers an op: ``normalise`` checks the public call's arguments and returns those that the backends take."""
    _NORMALISE[op] = normalise
    _BACKENDS[op] = backends


def backend_names(op: str) -> tuple[str, ...]:
    """The names of the op's backends, in order of preference."""
    return tuple(b.name for b in _BACKENDS[op])


def select(op: str, requested: str, args: tuple) -> Backend:
    """The backend for these arguments: the requested one or an error with the reason, or with "auto" the first that can."""
    if requested != "auto":
        for backend in _BACKENDS[op]:
            if backend.name == requested:
                reason = backend.supports(*args)
                if reason is not None:
                    raise BackendUnavailableError(f"{op}: backend {requested!r} cannot run this call: {reason}")
                return backend
        allowed = ", ".join(repr(n) for n in ("auto", *backend_names(op)))
        raise ValueError(f"backend must be one of {allowed} for {op}, got {requested!r}")
    for backend in _BACKENDS[op]:
        if backend.refusal(args) is None:
            return backend
    reasons = "; ".join(f"{b.name}: {b.refusal(args)}" for b in _BACKENDS[op])
    raise BackendUnavailableError(f"{op}: no backend can run this call ({reasons})")


def select_for_layers(op: str, requested: str, layers: Sequence[tuple]) -> Backend:
    """One backend for the calls of all layers: as :func:`select`, but it must take every one of them."""
    found = [select(op, requested, args) for args in layers]
    if len(found) == 1:  # torch.compile follows no further
        return found[0]
    # the one that is preferred least: what refused some layer stands before it
    chosen = max(found, key=_BACKENDS[op].index)
    for i, args in enumerate(layers):
        reason = None if found[i] is chosen else chosen.supports(*args)
        if reason is not None:
            raise BackendUnavailableError(
                f"{op}: no backend takes all layers: {chosen.name} cannot run layer {i}: {reason}"
            )
    return chosen


def select_backward(op: str, args: tuple) -> Backend:
    """The first backend that has a backward pass and takes these (forward) arguments unasked."""
    return next(b for b in _BACKENDS[op] if b.backward is not None and b.refusal(args) is None)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend a call of ``op`` would take with ``backend="auto"``, and why not the others.

    Args:
        op: name of an op: ``"compact_attention"``, ``"key_scores"``, ``"still_cross_attention"``, ``"pack_slots"``.
        *args, **kwargs: the arguments of the public op, without ``backend``, of one layer; they are checked, nothing is
            computed.

    Returns:
        Explanation: ``chosen`` and ``reasons``; ``print`` it for a short report.

    Raises:
        TypeError, ValueError: unknown op, or arguments that the op itself would refuse.
    """
    from .. import ops  # noqa: F401  (registers the backends)

    if op not in _BACKENDS:
        raise ValueError(f"op must be one of {', '.join(map(repr, _BACKENDS))}, got {op!r}")
    try:
        inspect.signature(_NORMALISE[op]).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain({op!r}, ...): {error}") from None
    normalised = _NORMALISE[op](*args, **kwargs)
    chosen, reasons = None, {}
    for backend in _BACKENDS[op]:
        reason = backend.refusal(normalised)
        if reason is None and chosen is None:
            chosen = backend.name
        else:
            reasons[backend.name] = reason or f"could run it too; {chosen!r} is preferred"
    return Explanation(op, chosen, reasons)
