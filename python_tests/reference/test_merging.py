# SPDX-License-Identifier: Apache-2.0
"""MiniCache's rule, against plain trigonometry in fp64."""

import math

import pytest
import torch

from kvcompact_kernels.reference.merging import angular_distance, merge_layers, slerp


def by_hand(a, b, weight):
    """One pair of vectors in Python's floats, as the paper writes it."""
    length_a, length_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    angle = math.acos(max(-1.0, min(1.0, sum(x * y for x, y in zip(a, b)) / (length_a * length_b))))
    p, q = math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)
    return [p * x / length_a + q * y / length_b for x, y in zip(a, b)], angle / math.pi


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_slerp_is_the_formula(weight, dtype, error):
    a, b = 3 * torch.randn(2, 5, 7, dtype=dtype) + 0.5, torch.randn(2, 5, 7, dtype=dtype)
    got, distance = slerp(a, b, weight), angular_distance(a, b)
    assert got.dtype == distance.dtype == dtype
    for i in range(2):
        for j in range(5):
            want, angle = by_hand(a[i, j].tolist(), b[i, j].tolist(), weight)
            torch.testing.assert_close(got[i, j].double(), torch.tensor(want, dtype=torch.float64), atol=error, rtol=0)
            assert abs(distance[i, j].item() - angle) < error


def test_the_angle_is_shared_out_by_the_weight():
    a, b = torch.randn(2, 50, 16, dtype=torch.float64)
    e = slerp(a, b, 0.6)
    torch.testing.assert_close(angular_distance(a, e), 0.6 * angular_distance(a, b))
    torch.testing.assert_close(angular_distance(e, b), 0.4 * angular_distance(a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parallel_opposite_and_zero_vectors(dtype):
    a = torch.tensor([1.0, -2.0, 2.0], dtype=dtype)
    zero = torch.zeros(3, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    unit = torch.tensor([1 / 3, -2 / 3, 2 / 3], dtype=wide)
    for b, want in ((2 * a, unit), (-a, -unit), (zero, unit)):
        torch.testing.assert_close(slerp(a, b, 0.6), want)
    torch.testing.assert_close(slerp(zero, a, 0.6), unit)
    assert angular_distance(a, 4 * a).item() == 0 and angular_distance(a, -a).item() == pytest.approx(1)
    direction, below, above = merge_layers(zero, zero, 0.6)
    assert not direction.any() and below == above == 0
    direction, below, above = merge_layers(zero, a, 0.6)
    assert below == 0 and above.isfinite()
    # nearly parallel: where sin(a) is lost to rounding
    close = a.to(wide) * (1 + 1e-7)
    assert slerp(a.to(wide), close, 0.6).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_layer_gets_its_own_length_back(dtype):
    a, b = (5 * torch.randn(3, 40, 64)).to(dtype), torch.randn(3, 40, 64).to(dtype)
    direction, below, above = merge_layers(a, b, 0.6)
    assert direction.dtype == dtype and below.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for x, norm in ((a, below), (b, above)):
        restored = direction.double() * norm.double()[..., None]
        # also where the direction was rounded to 8 bits: its own length is divided out
        rounding = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(restored.norm(dim=-1), x.double().norm(dim=-1), rtol=rounding, atol=0)
