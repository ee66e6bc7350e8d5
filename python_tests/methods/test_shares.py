# SPDX-License-Identifier: Apache-2.0
"""The option ``shares``: KV heads with as many slots as a file says, whatever the method."""

import json

import pytest
import torch
from test_attention_matching import make_layer
from tiny_models import tiny_ids, tiny_model

from kvcompact_kernels import compact, patch_model
from kvcompact_kernels.head_shares import HeadShares
from kvcompact_kernels.methods import get_method, list_methods
from kvcompact_kernels.patch.families import model_spec
from kvcompact_kernels.token_selector import SelectorConfig, TokenSelector

SEPARATE = sorted(name for name, cls in list_methods().items() if cls.separate_heads)
SHARES = ((1.0, 3.0), (0.5, 0.5))


@pytest.fixture
def file(tmp_path):
    HeadShares(SHARES, {"family": "llama"}, {"method": "snapkv"}).save(tmp_path / "shares.json")
    return tmp_path / "shares.json"


def save_selector(path, shares):
    config = SelectorConfig(head_dim=8, num_kv_heads=2, hidden=4, kernel=3, shares=shares)
    TokenSelector(config, 2, {"family": "llama"}).save(path)
    return path


def test_which_methods_take_it():
    for name in ("attention_matching", "compose", "expected_attention", "h2o", "snapkv", "streaming_llm", "uniform"):
        assert name in SEPARATE
    for name in sorted(set(list_methods()) - set(SEPARATE) - {"still"}):  # still has its own
        with pytest.raises(TypeError, match="has no option"):
            get_method(name, shares="f.json")
    assert "shares" not in vars(get_method("snapkv", shares=None))


@pytest.mark.parametrize("name", SEPARATE)
def test_a_head_has_what_it_would_have_if_all_had_so_many(name, file):
    layer, _ = make_layer()
    method = get_method(name, shares=str(file))
    assert method.name == name and method.budgets(20, 90, 2) == [32, 8]
    block = method.compact_layer(layer, 20)
    assert block.slot_counts.tolist() == [[10, 30]] * 2
    for head, count in enumerate((10, 30)):
        alone = get_method(name).compact_layer(layer, count)
        for b in range(2):
            for got, wanted in zip(block.heads()[b][head], alone.heads()[b][head]):
                if wanted is None:  # packed heads have a bias if one of them has
                    assert got is None or not got.any()
                else:
                    torch.testing.assert_close(got, wanted)


def test_a_fit_by_matching_pursuit_takes_it_too(file):
    layer, _ = make_layer(tokens=40, batch=1)
    block = get_method("attention_matching", keys="omp", shares=str(file)).compact_layer(layer, 12)
    assert block.slot_counts.tolist() == [[6, 18]]


@pytest.mark.parametrize("slots", [5, 6, 89, 90])
def test_few_and_all_slots(slots, file):
    layer, _ = make_layer()
    method = get_method("snapkv", shares=str(file))
    block = method.compact_layer(layer, slots)
    assert (
        (block.slot_counts.sum(1) == 2 * slots).all() and 5 <= block.slot_counts.min() and block.slot_counts.max() <= 90
    )
    with pytest.raises(ValueError, match="slots must be in"):
        method.compact_layer(layer, 91)
    with pytest.raises(ValueError, match="slots must be in"):
        method.compact_layer(layer, 4)


@pytest.mark.parametrize("name", ["snapkv", "attention_matching"])
def test_a_model_reads_and_answers_with_it(name, tmp_path):
    model = patch_model(tiny_model("qwen3", torch.float32))
    spec = model_spec(model)
    path = tmp_path / "s.json"
    HeadShares(((0.5, 1.5), (1.0, 3.0)), spec.fingerprint).save(path)
    ids = tiny_ids(2, 96)
    patch_model(model, name, ratio=4, shares=str(path))
    cache = model.compact(ids)
    # 96 slots of 2 heads in 2 layers, by 1 : 3 : 2 : 6
    assert [block.slot_counts.tolist() for block in cache.layers] == [[[8, 24]] * 2, [[16, 48]] * 2]
    assert cache.method == name and cache.info["options"]["shares"] == str(path) and "sinks" in cache.info["options"]
    with torch.no_grad():
        logits = model(tiny_ids(2, 5, seed=3), past_key_values=cache).logits
    assert logits.isfinite().all()
    patch_model(model, name, ratio=4, compact_over=40, shares=str(path))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 100)


def test_files_are_read_back(file, tmp_path):
    read = HeadShares.load(file)
    assert read.shares == SHARES and read.fingerprint == {"family": "llama"} and read.info == {"method": "snapkv"}
    selector = save_selector(tmp_path / "selector.safetensors", SHARES)
    assert HeadShares.load(selector).shares == SHARES
    layer, _ = make_layer()
    block = get_method("snapkv", shares=str(selector)).compact_layer(layer, 20)
    assert block.slot_counts.tolist() == [[10, 30]] * 2


def test_the_mean_of_measurements_is_geometric():
    first, second = (
        HeadShares(SHARES, {"family": "llama"}, {"n": 1}),
        HeadShares(((4.0, 4.0), (4.0, 36.0)), {"family": "llama"}),
    )
    mean = HeadShares.mean([first, second])
    # with SHARES / 1.25 and (1, 1), (1, 9) / 3: the roots of 1, 3, 0.5 and 4.5, up to a factor
    roots = torch.tensor([[1.0, 3.0], [0.5, 4.5]]).sqrt()
    torch.testing.assert_close(torch.tensor(mean.shares), roots / roots.mean())
    assert mean.fingerprint == {"family": "llama"} and mean.info == {"mean_of": [{"n": 1}, {}]}
    with pytest.raises(ValueError, match="must not be empty"):
        HeadShares.mean([])
    with pytest.raises(ValueError, match="must be of one model: family"):
        HeadShares.mean([first, HeadShares(SHARES, {"family": "qwen3"})])
    with pytest.raises(ValueError, match="must be of one model: they have other heads"):
        HeadShares.mean([first, HeadShares(SHARES[:1], {"family": "llama"})])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[: len(text) // 2], "is damaged, or holds no shares"),
        (lambda text: "", "is damaged, or holds no shares"),
        (lambda text: "[1, 2]", "its format is not 'kvcompact-head-shares'"),
        (lambda text: text.replace("kvcompact-head", "kvcompact-tail"), "its format is not 'kvcompact-head-shares'"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "has version 2 of its format"),
        (lambda text: text.replace("3.0", "0.0"), "is damaged: shares must be finite and above 0"),
        (lambda text: text.replace("3.0", "Infinity"), "is damaged: shares must be finite and above 0"),
        (lambda text: text.replace("3.0", '"a"'), "is damaged: shares must be numbers"),
        (lambda text: text.replace("1.0, 3.0", "1.0"), "is damaged: shares must have a number for each"),
        (lambda text: text.replace("fingerprint", "finger"), "is damaged: 'fingerprint'"),
    ],
)
def test_damaged_files_are_refused_by_name(change, message, file):
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        get_method("snapkv", shares=str(file))
    assert str(file) in str(caught.value)


def test_what_is_no_such_file_is_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError):
        get_method("snapkv", shares=str(file) + ".none")
    with pytest.raises(TypeError, match="shares must be a path, got int"):
        get_method("snapkv", shares=3)
    with pytest.raises(ValueError, match="does not say how many slots each head needs"):
        get_method("snapkv", shares=save_selector(tmp_path / "s.safetensors", None))
    with pytest.raises(ValueError, match="second_options must leave out shares"):
        get_method("compose", second_options={"shares": str(file)})
    with pytest.raises(ValueError, match="options must leave out shares"):
        get_method("adakv", options={"shares": str(file)})


@pytest.mark.parametrize("shares", [((1.0, 1.0),) * 2, ((1.0, 1.0),) * 3, ((1.0,),) * 2])
def test_files_of_another_model_are_refused_before_it_reads(shares, tmp_path):
    model = tiny_model("qwen3", torch.float32)
    spec = model_spec(model)
    other = {**spec.fingerprint, "weights": "other"} if len(shares) == 2 and len(shares[0]) == 2 else spec.fingerprint
    HeadShares(shares, other).save(tmp_path / "s.json")
    with pytest.raises(ValueError, match="was made for another model") as caught:
        compact(model, tiny_ids(1, 64), "snapkv", ratio=4, shares=str(tmp_path / "s.json"))
    assert str(tmp_path / "s.json") in str(caught.value)


def test_a_file_that_cannot_be_written_leaves_the_old_one(file, monkeypatch):
    before = file.read_text()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        HeadShares(SHARES, {}).save(file)
    assert file.read_text() == before and json.loads(before)["shares"] == [list(row) for row in SHARES]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
