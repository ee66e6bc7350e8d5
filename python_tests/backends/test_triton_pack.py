# SPDX-License-Identifier: Apache-2.0
"""The packing kernel against its definition, bit for bit: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from triton_cases import DEVICES, Counted

pytest.importorskip("triton")
from kvcompact_kernels.backends.triton import pack as backend
from kvcompact_kernels.reference.pack import pack_slots
from kvcompact_kernels.testing.poison import poisoned

pytestmark = pytest.mark.parametrize("device", DEVICES)


def make(device, dtype=torch.bfloat16, tokens=63, slots=33, head_dim=64):
    keys, values = (poisoned(torch.randn(2, 3, tokens, head_dim, device=device).to(dtype)) for _ in range(2))
    rows = [torch.randperm(tokens, device=device)[:slots].sort().values for _ in range(6)]
    return keys, values, torch.stack(rows).view(2, 3, slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(63, 33, 64), (1, 1, 128), (40, 40, 80), (100, 5, 8)])
def test_equals_the_definition(device, dtype, sizes):
    keys, values, indices = make(device, dtype, *sizes)
    for got, want in zip(backend.run(keys, values, indices), pack_slots(keys, values, indices)):
        assert got.is_contiguous() and torch.equal(got, want)


def test_one_list_for_all_heads_and_strided_indices(device):
    keys, values, indices = make(device)
    wide = torch.stack([indices, torch.full_like(indices, -7)], -1)[..., 0]
    for which in (indices[0, 0], wide, wide[1, 2]):
        for got, want in zip(backend.run(keys, values, which), pack_slots(keys, values, which)):
            assert torch.equal(got, want)


def test_an_index_out_of_range_gives_nan_and_reads_nothing(device):
    keys, values, indices = make(device)
    indices[1, 2, 4], indices[0, 0, 0] = 63, -1
    for got in backend.run(keys, values, indices):
        bad = got.isnan().all(-1)
        assert bad[1, 2, 4] and bad[0, 0, 0] and bad.sum() == 2 and got.isnan().any(-1).sum() == 2


def test_nothing_to_pack(device):
    keys, values, indices = make(device)
    assert backend.run(keys, values, indices[..., :0])[0].shape == (2, 3, 0, 64)


def make_layers(device, dtype=torch.bfloat16, head_dim=64, odd=False):
    """Layers of different lengths, slots, memory layouts, and kinds of indices; ``odd``: at addresses of single elements."""
    layers = [make(device, dtype, tokens, slots, head_dim) for tokens, slots in ((63, 33), (1, 1), (100, 5), (64, 64))]
    keys, values, indices = layers[2]
    gap = torch.full_like(keys, float("nan"))
    keys = (
        torch.cat([gap[..., :1], keys, gap], -1)[..., 1 : head_dim + 1]
        if odd
        else torch.cat([keys, gap], -1)[..., :head_dim]
    )
    layers[2] = (keys, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (values, indices)))
    layers[3] = (*layers[3][:2], layers[3][2][1, 2])
    return layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim,odd", [(64, False), (64, True), (80, False), (6, False), (128, False)])
def test_layers_of_any_length_and_layout_in_one_launch(device, dtype, head_dim, odd, monkeypatch):
    from kvcompact_kernels.backends.triton.kernels import pack as kernels

    layers = make_layers(device, dtype, head_dim, odd)
    grids = []
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "pack_slots", Counted(kernels.pack_slots, grids))
        packed = backend.run_layers(layers)
    assert grids == [(4 * 6 * 2,)]
    for layer, pair in zip(layers, packed):
        for got, want in zip(pair, pack_slots(*layer)):
            assert got.is_contiguous() and torch.equal(got, want)
            assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


def test_layers_without_slots(device):
    layers = make_layers(device)
    nothing = (*layers[0][:2], layers[0][2][..., :0])
    packed = backend.run_layers([nothing, layers[2], nothing, layers[0]])
    assert [k.shape[2] for k, _ in packed] == [0, 5, 0, 33]
    for layer, pair in zip((layers[2], layers[0]), packed[1::2]):
        for got, want in zip(pair, pack_slots(*layer)):
            assert torch.equal(got, want)
    assert [k.shape[2] for k, _ in backend.run_layers([nothing, nothing])] == [0, 0]


def test_an_index_out_of_range_of_its_own_layer_gives_nan(device):
    (keys, values, indices), other = make(device, tokens=20, slots=5), make(device, tokens=63)
    indices[0, 1, 2] = 20
    (got, _), (whole, _) = backend.run_layers([(keys, values, indices), other])
    assert got.isnan().all(-1).sum() == 1 and got[0, 1, 2].isnan().all() and not whole.isnan().any()


def test_layers_beyond_31_bits(device):
    """Strides so large that 32-bit offsets would wrap; the memory is virtual and mostly untouched."""
    stride = 1 << 30
    size = 2 * stride + 5 * stride // 8 + 64
    try:
        buffer = torch.empty(size, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    far = buffer.as_strided((3, 1, 5, 64), (stride, 0, stride // 8, 1))
    far.copy_(torch.randn(far.shape, device=device))
    near = torch.randn(3, 1, 9, 64, device=device).bfloat16()
    which = torch.tensor([4, 1], device=device)
    layers = [(near, near, which), (far, far, which)]
    for layer, pair in zip(layers, backend.run_layers(layers)):
        for got, want in zip(pair, pack_slots(*layer)):
            assert torch.equal(got, want)


def test_needs_no_gradient(device):
    keys, values, indices = make(device)
    assert "backward" in backend.supports(keys.float().requires_grad_(), values.float(), indices)
    assert backend.supports(keys, values, indices) is None
