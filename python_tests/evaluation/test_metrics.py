# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from kvcompact_kernels.evaluation import metrics
from kvcompact_kernels.evaluation.memory import peak_bytes
from kvcompact_kernels.evaluation.specs import parse_lengths, parse_ratios, parse_spec


def test_kl_and_cross_entropy_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    want = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert metrics.kl_divergence(p.log(), q.log()).item() == pytest.approx(want)
    assert metrics.kl_divergence(p.log(), p.log()).item() == 0
    assert metrics.cross_entropy(q.log(), torch.tensor([[2]])).item() == pytest.approx(math.log(2))
    assert metrics.top_agreement(torch.tensor([[1.0, 2], [2, 1]]), torch.tensor([[1.0, 3], [1, 3]])) == 0.5


def test_utilisation():
    assert metrics.utilisation(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert metrics.utilisation(2.0, 3.0, 1.0) == pytest.approx(0.5), "cross-entropies: the signs cancel"
    assert metrics.utilisation(0.1, 0.2, 0.8) < 0
    assert metrics.utilisation(0.3, 0.4, 0.4) is None


@pytest.mark.parametrize(
    "answer, text, want",
    [
        ("1234", "it is 1234.", True),
        ("1234", "it is 12345", False),
        ("South Asia", "in south\n asia, perhaps", True),
        ("south-asia", "South-Asia", True),
        ("cat", "concatenate", False),
        ("a.b", "axb", False),
        ("", "anything", False),
    ],
)
def test_found(answer, text, want):
    assert metrics.found(answer, text) is want


def test_scores():
    assert metrics.score_all(("1", "2", "3", "4"), "2 and 4") == 0.5
    assert metrics.score_any(("1", "2"), "2 and 4") == 1.0 and metrics.score_any(("1",), "2") == 0.0
    assert metrics.word_f1("the red tower", "Tower, red!") == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.word_f1("a a b", "a") == pytest.approx(2 * 1 / 4)
    assert metrics.word_f1("x", "") == 0.0
    assert metrics.score_f1(("x", "y z"), "z y") == 1.0


def test_next_token_logs_are_the_models(model):
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(metrics.next_token_logs(model, ids, None), want[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics.next_token_logs(model, ids, None, first=9), want[8:-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="first"):
        metrics.next_token_logs(model, ids, None, first=17)


def test_peak_of_new_tensors():
    held = torch.zeros(1000)

    def work():
        first = held + 1  # 4000
        second = first.repeat(3)  # 12000 more: the peak
        del first
        held.mul_(2)  # in place: nothing new
        return second[:10].clone()

    result, peak = peak_bytes(work, torch.device("cpu"))
    assert result.shape == (10,) and peak == 16000


def test_specs():
    assert parse_spec("h2o") == ("h2o", {})
    assert parse_spec("snapkv:window=16:pooling=max:x=true") == ("snapkv", {"window": 16, "pooling": "max", "x": True})
    assert parse_spec("still:weights=c:/x:n=1") == ("still", {"weights": "c:/x", "n": 1})
    compose = 'compose:first=snapkv:first_options={"window":16}:second=h2o'
    assert parse_spec(compose) == ("compose", {"first": "snapkv", "first_options": {"window": 16}, "second": "h2o"})
    assert parse_lengths("2k,512,2048") == [512, 2048] and parse_ratios("8,4,4.5") == [4, 4.5, 8]
    for bad in ("x", "", "0", "1kk", "-3"):
        with pytest.raises(ValueError, match="lengths"):
            parse_lengths(bad)
    for bad in ("x", "0.5", "inf", "nan"):
        with pytest.raises(ValueError, match="ratios"):
            parse_ratios(bad)
    for bad in ("a:b", ":x=1", "a:1x=2"):
        with pytest.raises(ValueError, match="NAME=VALUE|no name"):
            parse_spec(bad)
