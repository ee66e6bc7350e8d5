# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch

from kvcompact_kernels.reference import matching
from kvcompact_kernels.reference.selection import gather_tokens


def brute_force(gram, rhs, lower, upper):
    """Every guess of which entries stand at which bound; the best feasible point is the minimum."""
    n, best, found = len(rhs), math.inf, None
    for at in itertools.product((-1, 0, 1), repeat=n):
        state = torch.tensor(at)
        x = torch.full_like(rhs, upper).masked_fill(state < 0, lower)
        free = state == 0
        if free.any():
            x[free] = torch.linalg.solve(gram[free][:, free], rhs[free] - gram[free][:, ~free] @ x[~free])
        if (x >= lower).all() and (x <= upper).all():
            value = 0.5 * x @ gram @ x - rhs @ x
            if value < best:
                best, found = value, x
    return found


def kkt_residual(gram, rhs, x, lower, upper):
    """Largest violation of the KKT conditions: the gradient must vanish inside and point outwards at a bound."""
    gradient = gram @ x - rhs
    inside = (x > lower) & (x < upper)
    violation = torch.where(
        inside, gradient.abs(), torch.where(x <= lower, (-gradient).clamp_min(0), gradient.clamp_min(0))
    )
    return violation.max().item()


def random_problem(n, rows, dtype=torch.float64):
    a = torch.randn(rows, n, dtype=dtype)
    return a.T @ a + 1e-3 * torch.eye(n, dtype=dtype), 2 * (a.T @ torch.randn(rows, dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_bounded_least_squares_equals_brute_force(n):
    for _ in range(5):
        gram, rhs = random_problem(n, n + 1)
        got = matching.bounded_least_squares(gram, rhs, 0.1, 1.5)
        torch.testing.assert_close(got, brute_force(gram, rhs, 0.1, 1.5), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n, rows", [(40, 30), (120, 200), (200, 64)])
def test_bounded_least_squares_meets_the_kkt_conditions(n, rows):
    gram, rhs = random_problem(n, rows)
    x = matching.bounded_least_squares(gram, rhs, 0.0, 0.2)
    assert x.min() >= 0.0 and x.max() <= 0.2
    assert (x == 0.0).any() and (x == 0.2).any(), "the problem should have active bounds on both sides"
    assert kkt_residual(gram, rhs, x, 0.0, 0.2) < 1e-9 * rhs.abs().max()
    # a perturbed point must not pass the same check
    assert kkt_residual(gram, rhs, x + 1e-3, 0.0, 0.2) > 1e-6


def test_bounded_least_squares_without_active_bounds_solves_the_system():
    gram, rhs = random_problem(9, 30)
    x = torch.linalg.solve(gram, rhs)
    torch.testing.assert_close(matching.bounded_least_squares(gram, rhs, -1e6, 1e6), x)


def test_bounded_least_squares_is_batched():
    problems = [random_problem(7, 9) for _ in range(6)]
    gram = torch.stack([g for g, _ in problems]).reshape(2, 3, 7, 7)
    rhs = torch.stack([r for _, r in problems]).reshape(2, 3, 7)
    got = matching.bounded_least_squares(gram, rhs, 0.0, 1.0)
    for i, (g, r) in enumerate(problems):
        assert torch.equal(got[i // 3, i % 3], matching.bounded_least_squares(g, r, 0.0, 1.0))


def test_bounded_least_squares_refuses():
    gram, rhs = random_problem(4, 6)
    with pytest.raises(ValueError, match="lower must be less"):
        matching.bounded_least_squares(gram, rhs, 1.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        matching.bounded_least_squares(gram, rhs * float("nan"), 0.0, 1.0)
    with pytest.raises(ValueError, match="raise the ridge"):
        matching.bounded_least_squares(-gram, rhs, 0.0, 1.0)


def toy(batch=2, heads=3, rows=50, tokens=31, dim=8, slots=7):
    queries = torch.randn(batch, heads, rows, dim, dtype=torch.float64)
    keys = torch.randn(batch, heads, tokens, dim, dtype=torch.float64)
    values = torch.randn(batch, heads, tokens, dim, dtype=torch.float64)
    indices = torch.rand(batch, heads, tokens).topk(slots).indices.sort().values
    return queries, keys, values, indices


@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_equations_are_those_of_the_definition_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK_ELEMENTS", chunk)
    queries, keys, values, indices = toy()
    logits = 0.3 * queries @ keys.transpose(-1, -2)
    prob = logits.softmax(-1)
    outputs, lse, scores = matching.full_attention(queries, keys, values, 0.3)
    torch.testing.assert_close(outputs, prob @ values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(scores, prob.square().mean(2).sqrt())
    torch.testing.assert_close(matching.full_attention(queries, keys, values, 0.3, "max")[2], prob.amax(2))

    chosen = prob.gather(3, indices[:, :, None].expand(-1, -1, 50, -1))
    gram, rhs = matching.mass_equations(queries, gather_tokens(keys, indices), lse, 0.3)
    torch.testing.assert_close(gram, chosen.transpose(-1, -2) @ chosen)
    torch.testing.assert_close(rhs, chosen.sum(2))

    beta = torch.randn(2, 3, 7, dtype=torch.float64)
    slot_keys = gather_tokens(keys, indices)
    weight = (0.3 * queries @ slot_keys.transpose(-1, -2) + beta[:, :, None]).softmax(-1)
    gram, rhs = matching.value_equations(queries, slot_keys, beta, outputs, 0.3)
    torch.testing.assert_close(gram, weight.transpose(-1, -2) @ weight)
    torch.testing.assert_close(rhs, weight.transpose(-1, -2) @ outputs)


def test_mass_is_matched_and_beta_stays_in_its_limits():
    queries, keys, values, indices = toy(rows=200)
    _, lse, _ = matching.full_attention(queries, keys, values, 0.3)
    gram, rhs = matching.mass_equations(queries, gather_tokens(keys, indices), lse, 0.3)
    prob = (0.3 * queries @ keys.transpose(-1, -2)).softmax(-1)
    chosen = prob.gather(3, indices[:, :, None].expand(-1, -1, 200, -1))
    beta = matching.match_mass(gram, rhs, ridge=1e-6, limit=5.0)
    error = ((chosen * beta.exp()[:, :, None]).sum(-1) - 1).square().mean()
    without = (chosen.sum(-1) - 1).square().mean()
    assert error < 0.1 * without
    tight = matching.match_mass(gram, rhs, ridge=1e-6, limit=0.5)
    assert tight.abs().max() <= 0.5 and tight.max() == 0.5
    # a huge ridge leaves the slots as they are
    assert matching.match_mass(gram, rhs, ridge=1e9, limit=5.0).abs().max() < 1e-6


def test_values_solve_the_ridge_normal_equations():
    queries, keys, values, indices = toy()
    outputs, _, _ = matching.full_attention(queries, keys, values, 0.3)
    slot_keys, start = gather_tokens(keys, indices), gather_tokens(values, indices)
    beta = torch.randn(2, 3, 7, dtype=torch.float64)
    gram, rhs = matching.value_equations(queries, slot_keys, beta, outputs, 0.3)
    fitted = matching.match_values(gram, rhs, start, ridge=1e-2)
    lam = 1e-2 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    torch.testing.assert_close(gram @ fitted + lam * fitted, rhs + lam * start)
    assert (matching.match_values(gram, rhs, start, ridge=1e9) - start).abs().max() < 1e-6


def test_all_keys_chosen_is_the_cache_itself():
    queries, keys, values, _ = toy(rows=300, tokens=12)
    outputs, lse, _ = matching.full_attention(queries, keys, values, 0.3)
    gram, rhs = matching.mass_equations(queries, keys, lse, 0.3)
    beta = matching.match_mass(gram, rhs, 1e-6, 5.0)
    assert beta.abs().max() < 1e-8
    gram, rhs = matching.value_equations(queries, keys, beta, outputs, 0.3)
    torch.testing.assert_close(matching.match_values(gram, rhs, values, 1e-6), values, rtol=1e-6, atol=1e-6)


def test_matching_pursuit_finds_keys_that_the_largest_attention_misses():
    # keys 2 and 3 are one direction, seen by all queries; key 5 alone explains the other queries, with less attention each
    dim = 4
    keys = torch.zeros(1, 1, 8, dim, dtype=torch.float64)
    keys[0, 0, 2, 0] = keys[0, 0, 3, 0] = 6.0
    keys[0, 0, 5, 1] = 3.0
    queries = torch.zeros(1, 1, 40, dim, dtype=torch.float64)
    queries[0, 0, :20, 0] = queries[0, 0, 20:, 1] = 1.0
    prob = (queries @ keys.transpose(-1, -2)).softmax(-1)
    assert sorted(prob.amax((0, 1, 2)).topk(2).indices.tolist()) != [2, 5]
    lse = (queries @ keys.transpose(-1, -2)).logsumexp(-1)
    got = matching.matching_pursuit(queries, keys, lse, 2, 1.0, 1e-6, 5.0)
    assert got.tolist() in ([[[2, 5]]], [[[3, 5]]])


def test_matching_pursuit_takes_the_key_with_most_mass_first():
    # a third of the queries give most of their attention to key 1; key 0 has a little of every query
    keys = torch.zeros(1, 1, 40, 4, dtype=torch.float64)
    keys[0, 0, 0, 0], keys[0, 0, 1, 1] = 0.5, 4.0
    queries = torch.zeros(1, 1, 30, 4, dtype=torch.float64)
    queries[..., 0], queries[0, 0, :10, 1] = 1.0, 1.0
    logits = queries @ keys.transpose(-1, -2)
    prob = logits.softmax(-1)[0, 0]
    assert (prob / prob.norm(dim=0)).sum(0).argmax() != 1 == prob.sum(0).argmax()
    assert matching.matching_pursuit(queries, keys, logits.logsumexp(-1), 1, 1.0, 1e-6, 7.0).tolist() == [[[1]]]


def test_matching_pursuit_beats_the_largest_attention_on_mass():
    queries, keys, _, _ = toy(rows=120, tokens=60)
    prob = (0.5 * queries @ keys.transpose(-1, -2)).softmax(-1)

    def error(indices):
        chosen = prob.gather(3, indices[:, :, None].expand(-1, -1, 120, -1))
        beta = matching.match_mass(chosen.transpose(-1, -2) @ chosen, chosen.sum(2), 1e-6, 7.0)
        return ((chosen * beta.exp()[:, :, None]).sum(-1) - 1).square().mean()

    lse = (0.5 * queries @ keys.transpose(-1, -2)).logsumexp(-1)
    greedy = matching.matching_pursuit(queries, keys, lse, 8, 0.5, 1e-6, 7.0, first=1)
    assert greedy.shape == (2, 3, 8) and (greedy.diff(dim=-1) > 0).all() and (greedy[..., 0] == 0).all()
    assert error(greedy) < error(prob.amax(2).topk(8).indices.sort().values)


def test_reference_queries_are_grouped_and_thinned():
    queries = torch.arange(2 * 6 * 10.0).reshape(2, 6, 10, 1)
    whole = matching.reference_queries(queries, 2)
    assert torch.equal(whole, queries.reshape(2, 2, 30, 1))
    thin = matching.reference_queries(queries, 2, limit=12)
    assert torch.equal(thin, queries[:, :, [0, 3, 6, 9]].reshape(2, 2, 12, 1))
    assert torch.equal(matching.reference_queries(queries, 2, limit=1), queries[:, :, [9]].reshape(2, 2, 3, 1))
