# SPDX-License-Identifier: Apache-2.0
"""What holds for every method that makes its slots from tokens."""

import pytest
import torch
from test_selection_methods import make_layer
from tiny_models import tiny_ids, tiny_model

from kvcompact_kernels import compact, patch_model
from kvcompact_kernels.methods import base, get_method, list_methods, register_method
from kvcompact_kernels.methods.cartridge import Cartridge
from kvcompact_kernels.methods.uniform import Uniform
from kvcompact_kernels.patch import is_patched

NAMES = [
    "random",
    "uniform",
    "scissorhands",
    "finch",
    "zsmerge",
    "expected_attention",
    "adakv",
    "magicpig",
    "compose",
    "kv_distill",
    "minicache",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_slots_is_the_cache_itself(name, dtype):
    layer = make_layer(19, dtype=dtype)
    block = get_method(name).compact_layer(layer, 19)
    assert torch.equal(block.keys, layer.keys) and torch.equal(block.values, layer.values) and block.beta is None
    assert block.keys.data_ptr() != layer.keys.data_ptr()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens, slots", [(53, 17), (53, 5), (53, 52), (6, 5), (200, 101)])
def test_counts_dtypes_and_memory(name, tokens, slots):
    layer = make_layer(tokens, dtype=torch.bfloat16)
    block = get_method(name).compact_layer(layer, slots)
    assert block.slot_counts.sum().item() == 4 * slots and block.slot_counts.min() >= 1
    assert block.keys.dtype == torch.bfloat16 and block.keys.isfinite().all() and block.values.isfinite().all()
    for tensor in block.tensors().values():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", NAMES)
def test_too_few_slots_and_nan_are_refused(name):
    method = get_method(name)
    with pytest.raises(ValueError, match="slots must be in"):
        method.compact_layer(make_layer(19), method.min_slots - 1)
    keys = torch.randn(2, 2, 19, 8)
    keys[0, 1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="keys of layer 1"):
        method.compact_layer(make_layer(19, keys=keys), 8)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_stay_as_they_are(name):
    layer = make_layer(53)
    before = [x.clone() for x in (layer.keys, layer.values, layer.queries)]
    get_method(name).compact_layer(layer, 17)
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.keys, layer.values, layer.queries)))


@pytest.mark.parametrize("name", NAMES)
def test_sinks_are_those_of_the_context_and_not_of_a_later_part(name):
    torch.manual_seed(0)
    options = {"rerotate": False} if name == "finch" else {}
    first = make_layer(90, batch=1)
    later = make_layer(
        90, batch=1, keys=first.keys, values=first.values, queries=first.queries, positions=first.positions + 50
    )
    method = get_method(name, **options)

    def has_the_first_tokens(layer):
        heads = method.compact_layer(layer, 12).heads()[0]
        return [
            all((keys == layer.keys[0, h, i]).all(-1).any() for i in range(4)) for h, (keys, _, _) in enumerate(heads)
        ]

    assert all(has_the_first_tokens(first))
    assert not all(has_the_first_tokens(later))


VARIANTS = {
    "adakv over h2o": ("adakv", {"scorer": "h2o"}),
    "adakv over pyramidkv": ("adakv", {"scorer": "pyramidkv"}),
    "matching pursuit": ("attention_matching", {"keys": "omp", "max_queries": 40}),
    "compose with zsmerge": ("compose", {"first": "h2o", "second": "zsmerge"}),
    "still in chunks": ("still", {"weights": "identity", "chunk": 16}),
}


def compacts(method):
    return get_method(method).whole_context_only is None


@pytest.mark.filterwarnings("ignore:the package has no weights")
@pytest.mark.parametrize("name", [*filter(compacts, sorted(set(list_methods()) - {"full"})), *VARIANTS])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_method_compacts_a_running_conversation(name, family):
    method, options = VARIANTS.get(name, (name, {}))
    model = patch_model(tiny_model(family, dtype=torch.float32), method, ratio=2, compact_over=24, **options)
    out = model.generate(tiny_ids(1, 60), max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    session = out.past_key_values
    assert out.sequences.shape == (1, 90) and session.context_length >= 60 + 24
    held = [int(layer.block.slot_counts.sum()) for layer in session.layers if not layer.is_sliding]
    if "pyramidkv" in name:  # layers hold unequal numbers
        held = [sum(held) / len(held)]
    assert all(2 * 0.4 * session.context_length < slots < 2 * 0.6 * session.context_length for slots in held)


def test_full_keeps_a_running_conversation_whole():
    model, ids = tiny_model(dtype=torch.float64), tiny_ids(1, 60)
    want = model.generate(ids, max_new_tokens=30, do_sample=False)
    out = patch_model(model, "full", compact_over=24).generate(
        ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, want)
    assert [layer.block.num_slots for layer in out.past_key_values.layers] == [out.past_key_values.context_length] * 2


def test_methods_that_cannot_compact_a_running_conversation_say_why(tmp_path):
    model, ids = tiny_model(num_hidden_layers=4, dtype=torch.float32), tiny_ids(1, 30)
    Cartridge.from_cache(compact(model, ids, "cartridge", slots=8)).save(tmp_path / "c.kvc")
    for name, options, why in (
        ("attention_matching", {"queries": "repeat"}, "reads the context twice"),
        ("compose", {"first": "uniform", "second_options": {"queries": "repeat"}}, "reads the context twice"),
        ("minicache", {}, "lets layers share slots"),
        ("cartridge", {"file": tmp_path / "c.kvc"}, "takes the slots of one context from a file"),
    ):
        with pytest.raises(ValueError, match=f"compact_over cannot be used with method '{name}', which {why}"):
            patch_model(model, name, compact_over=24, **options)
    assert not is_patched(model)


def test_a_method_that_is_no_dataclass_has_no_options(monkeypatch):
    class Undecorated(Uniform):
        name = "undecorated"
        keep: int = 3

    monkeypatch.setitem(base._METHODS, "undecorated", Undecorated)
    with pytest.raises(
        TypeError, match="no option 'keep'; its options are: 'sinks', 'shares' .Undecorated is no dataclass"
    ):
        get_method("undecorated", keep=4)
    with pytest.raises(TypeError, match="its options are: 'sinks', 'shares'$"):
        get_method("uniform", keep=4)


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match="method must be a name or a Method with its options, got "):
        get_method(["snapkv"])
    with pytest.raises(TypeError, match="method must be a name or a Method with its options, got "):
        get_method(type(get_method("snapkv")))
    for wrong in (3, int):
        with pytest.raises(TypeError, match="takes a class that derives from Method"):
            register_method(wrong)
