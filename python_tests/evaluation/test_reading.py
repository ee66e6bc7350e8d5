# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from tiny_models import tiny_ids, tiny_model

from kvcompact_kernels import compact
from kvcompact_kernels.evaluation.reading import EqualBytes, byte_budget, read
from kvcompact_kernels.methods import get_method

METHODS = [
    ("snapkv", {"window": 8}),
    ("h2o", {}),
    ("uniform", {}),
    ("pyramidkv", {"window": 4}),
    ("adakv", {"options": {"window": 8}}),
    ("zsmerge", {}),
    ("kv_distill", {"weights": "identity"}),
    ("attention_matching", {"queries": "repeat", "max_queries": 40}),
    ("attention_matching", {"queries": "prefill", "max_queries": 40}),
]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_reading_gives_the_caches_of_separate_runs(family):
    model = tiny_model(family)
    ids = tiny_ids(1, 70)
    wanted = [(get_method(name, **options), slots) for name, options in METHODS for slots in (12, 30)]
    for (method, slots), result in zip(wanted, read(model, ids, wanted)):
        assert result.error is None
        alone = compact(model, ids, method, slots=slots)
        assert result.cache.method == alone.method and result.cache.logical_length == 70
        for one, other in zip(result.cache.layers, alone.layers):
            assert one.tensors().keys() == other.tensors().keys()
            for name, tensor in one.tensors().items():
                torch.testing.assert_close(tensor, other.tensors()[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_fits_into_the_budget_and_uses_it(family, dtype):
    model = tiny_model(family, dtype)
    equal = EqualBytes()
    for length in (150, 143):
        ids = tiny_ids(1, length)
        (full,) = read(model, ids, [(get_method("full"), 1)])
        wanted = [(f"{n}{o}", get_method(n, **o), r) for n, o in METHODS for r in (2.0, 5.0)]
        for (label, _, ratio), result in zip(wanted, equal.read(model, ids, full.cache, wanted)):
            assert result.error is None, label
            budget = byte_budget(full.cache, ratio)
            assert result.cache.nbytes <= budget, label
            slot = 2 * 2 * 16 * (4 if dtype == torch.float32 else 2) + 2 * 4
            # a slot in each layer, and the offsets of heads with unequal numbers
            assert budget - result.cache.nbytes < len(full.cache.compact_layers) * (2 * slot + 3 * 8), label


def test_budget_leaves_sliding_windows_alone():
    model = tiny_model("gemma3_text")
    (full,) = read(model, tiny_ids(1, 60), [(get_method("full"), 1)])
    windows = sum(b.nbytes for b in full.cache.layers) - sum(b.nbytes for b in full.cache.compact_layers)
    assert windows == 2 * 2 * 11 * 16 * 8
    assert byte_budget(full.cache, 1.0) == full.cache.nbytes and byte_budget(full.cache, math.inf) == windows


def test_failures_stay_where_they_are():
    model = tiny_model()
    wanted = [(get_method("h2o", sinks=50), 10), (get_method("h2o"), 10)]
    bad, good = read(model, tiny_ids(1, 64), wanted)
    assert bad.cache is None and "at least 51 slots" in bad.error
    assert good.error is None and good.cache.num_slots == 10


def test_memory_is_that_of_the_method():
    model = tiny_model(dtype=torch.float32)
    few, many = read(model, tiny_ids(1, 120), [(get_method("uniform"), 12), (get_method("full"), 1)])
    token = 2 * 2 * 16 * 4
    assert many.cache.nbytes == 2 * 120 * token
    # the layer before it was compacted, and both blocks
    assert many.peak_bytes >= 120 * token + many.cache.nbytes
    assert 120 * token + few.cache.nbytes <= few.peak_bytes < many.peak_bytes
    assert few.compact_seconds > 0 and few.read_seconds > 0


def test_a_method_sees_the_queries_that_it_asked_for_and_no_others():
    seen = {}

    class Curious(type(get_method("uniform"))):
        wanted = 0

        @property
        def queries_needed(self):
            return self.wanted

        def compact_layer(self, layer, slots):
            seen.setdefault(self.wanted, []).append(layer.queries)
            return super().compact_layer(layer, slots)

    model, ids, methods = tiny_model(), tiny_ids(1, 40), []
    for wanted in (0, 5, -1):
        methods.append(Curious())
        methods[-1].wanted = wanted
    assert all(result.error is None for result in read(model, ids, [(method, 9) for method in methods]))
    assert all(queries is None for queries in seen[0])
    for few, whole in zip(seen[5], seen[-1]):
        assert whole.shape == (1, 6, 40, 16) and torch.equal(few, whole[:, :, -5:])
