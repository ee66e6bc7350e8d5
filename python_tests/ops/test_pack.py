# SPDX-License-Identifier: Apache-2.0
"""pack_slots: the definition, gradients, memory of its own, bad input."""

import weakref

import pytest
import torch

from kvcompact_kernels import BackendUnavailableError, explain
from kvcompact_kernels.ops import pack_slots
from kvcompact_kernels.testing.poison import poisoned


def make(dtype=torch.float32, tokens=23, slots=7):
    keys, values = (poisoned(torch.randn(2, 3, tokens, 8).to(dtype)) for _ in range(2))
    return keys, values, torch.stack([torch.randperm(tokens)[:slots].sort().values for _ in range(6)]).view(2, 3, slots)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gathers_rows_of_each_head(dtype):
    keys, values, indices = make(dtype)
    packed = pack_slots(keys, values, indices)
    for x, got in zip((keys, values), packed):
        assert got.is_contiguous() and got.shape == (2, 3, 7, 8)
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
        for b in range(2):
            for h in range(3):
                assert torch.equal(got[b, h], x[b, h][indices[b, h]])


def test_one_list_for_all_heads():
    keys, values, _ = make()
    indices = torch.tensor([0, 5, 22])
    for x, got in zip((keys, values), pack_slots(keys, values, indices)):
        assert torch.equal(got, x[:, :, indices])


def make_layers(dtype=torch.float32):
    return [list(x) for x in zip(make(dtype), make(dtype, 40, 11), make(dtype, 7, 7))]


def test_lists_have_an_entry_a_layer():
    keys, values, indices = make_layers()
    indices[1] = torch.tensor([3, 39, 0])
    packed = pack_slots(keys, values, indices)
    assert len(keys) == 3 and [len(x) for x in packed] == [3, 3]
    for i in range(3):
        for got, want in zip((packed[0][i], packed[1][i]), pack_slots(keys[i], values[i], indices[i])):
            assert torch.equal(got, want) and got.untyped_storage().nbytes() == got.numel() * got.element_size()
    alone = pack_slots(keys[:1], tuple(values[:1]), indices[:1])
    assert torch.equal(alone[0][0], packed[0][0]) and torch.equal(alone[1][0], packed[1][0])


def test_release_frees_the_old_memory():
    keys, values, indices = make_layers()
    alive = [weakref.ref(x) for x in keys + values]
    packed = pack_slots(keys, values, indices, release=True)
    assert keys == [] and values == [] and len(indices) == 3
    assert [ref() for ref in alive] == [None] * 6
    assert not any(x.isnan().any() for x in packed[0] + packed[1])


def test_lists_are_kept_when_the_call_fails():
    keys, values, indices = make_layers()
    indices[2] = indices[2].int()
    with pytest.raises(TypeError, match=r"indices\[2\] must be int64"):
        pack_slots(keys, values, indices, release=True)
    assert len(keys) == len(values) == 3
    with pytest.raises(TypeError, match="keys must be a list for release"):
        pack_slots(tuple(keys), values, indices, release=True)
    with pytest.raises(ValueError, match="release=True needs lists"):
        pack_slots(keys[0], values[0], indices[0], release=True)


def test_gradients_of_layers():
    keys, values, indices = make_layers(torch.float64)
    keys[1].requires_grad_()
    packed = pack_slots(keys, values, indices)
    packed[0][1].sum().backward()
    wanted = torch.zeros_like(keys[1]).scatter_add_(
        2, indices[1][..., None].expand(-1, -1, -1, 8), torch.ones(2, 3, 11, 8).double()
    )
    assert torch.equal(keys[1].grad, wanted)


def test_bad_lists():
    keys, values, indices = make_layers()
    with pytest.raises(ValueError, match="keys must hold at least one layer"):
        pack_slots([], [], [])
    with pytest.raises(ValueError, match="indices must hold 3 layers, as keys does, got 2"):
        pack_slots(keys, values, indices[:2])
    with pytest.raises(TypeError, match="indices must be a list"):
        pack_slots(keys, values, indices[0])
    with pytest.raises(ValueError, match=r"values\[1\] must have shape"):
        pack_slots(keys, [values[0], values[0], values[2]], indices)
    with pytest.raises(ValueError, match=r"keys\[2\] must have shape \[2, 3, \*, 8\]"):
        pack_slots(keys[:2] + [keys[2][:1]], values[:2] + [values[2][:1]], indices[:2] + [indices[2][:1]])
    with pytest.raises(TypeError, match=r"keys\[1\] must be float32"):
        pack_slots(*([x[0], x[1].double() if x[1].is_floating_point() else x[1]] for x in (keys, values, indices)))
    with pytest.raises((BackendUnavailableError, ValueError)):
        pack_slots(keys, values, indices, backend="cpu")


def test_gradients():
    keys, values, indices = make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda k, v: pack_slots(k, v, indices), (keys.clone().requires_grad_(), values.clone().requires_grad_())
    )


def test_explain_names_the_argument_that_is_missing():
    with pytest.raises(TypeError, match=r"explain\('pack_slots', ...\): missing a required argument: "):
        explain("pack_slots")


def test_explains_its_choice():
    found = explain("pack_slots", *make())
    assert found.chosen == "torch" and "CUDA" in found.reasons["triton"] or "interpreter" in found.reasons["triton"]


def test_bad_input():
    keys, values, indices = make()
    with pytest.raises(ValueError, match="values must have shape"):
        pack_slots(keys, values[:, :, 1:], indices)
    with pytest.raises(TypeError, match="indices must be int64"):
        pack_slots(keys, values, indices.int())
    with pytest.raises(ValueError, match="indices must have shape"):
        pack_slots(keys, values, indices[:1])
    with pytest.raises(TypeError, match="keys must be floating"):
        pack_slots(keys.long(), values.long(), indices)
    with pytest.raises((BackendUnavailableError, ValueError)):
        pack_slots(keys, values, indices, backend="cpu")
