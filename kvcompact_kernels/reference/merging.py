# SPDX-License-Identifier: Apache-2.0
"""Two layers' vectors of one token as one direction and two lengths: MiniCache (arXiv 2405.14366)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def angular_distance(lower: Tensor, upper: Tensor) -> Tensor:
    """The angle between two vectors over pi, in ``[0, 1]``: ``[..., d]`` twice to ``[...]``, fp32 (fp64 for fp64)."""
    lower, upper = (normalize(_wide(x), dim=-1) for x in (lower, upper))
    # of the half angle: arccos loses half of the digits where the vectors are nearly parallel
    return 2 * torch.atan2((upper - lower).norm(dim=-1), (upper + lower).norm(dim=-1)) / torch.pi


def slerp(lower: Tensor, upper: Tensor, weight: float) -> Tensor:
    """The unit vector on the great circle from ``lower`` to ``upper``, ``weight`` of the way; neither need be a unit vector.

    ::

        e = sin((1 - w) a) / sin(a) * lower / |lower| + sin(w a) / sin(a) * upper / |upper|      a: the angle between them

    Of opposite vectors, which have no such direction, it is the one that weighs more; of a zero vector and another, the other.

    Args:
        lower, upper: ``[..., d]``.
        weight: in ``[0, 1]``; 0 is the direction of ``lower``.

    Returns:
        ``[..., d]``, fp32 (fp64 for fp64).
    """
    angle = angular_distance(lower, upper)[..., None] * torch.pi
    lower, upper = (normalize(_wide(x), dim=-1) for x in (lower, upper))
    # both weights times sin(a) / a, which are finite where sin(a) vanishes; the length is lost and made again
    below, above = (share * torch.special.sinc(share * angle / torch.pi) for share in (1 - weight, weight))
    mixed = below * lower + above * upper
    opposite = mixed.norm(dim=-1, keepdim=True) < 1e-5
    return normalize(torch.where(opposite, upper if weight >= 0.5 else lower, mixed), dim=-1)


def merge_layers(lower: Tensor, upper: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """One direction for both vectors, and for each the factor that gives it its own length again.

    Args:
        lower, upper: ``[..., d]`` of one dtype.

    Returns:
        ``(direction [..., d] in that dtype, lower_norm [...], upper_norm [...])``; the norms are fp32 (fp64 for fp64) and
        divided by the length that the rounded direction has.
    """
    direction = slerp(lower, upper, weight).to(lower.dtype)
    length = _wide(direction).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return direction, *(_wide(x).norm(dim=-1) / length for x in (lower, upper))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
