"""Frontier, equilibria and commitment against brute force in whole numbers on 10 000 games with ties."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.game import equilibrium, payoff
from gtalign_jax.game.moves import LLM, USER

N = 10_000

mixed_nash = jax.jit(equilibrium.mixed_nash)
price_of_anarchy = jax.jit(equilibrium.price_of_anarchy, static_argnames="floor")


def game(user, llm) -> np.ndarray:
    """A matrix [U, A, 2] from both players' tables."""
    return np.stack([np.float32(llm), np.float32(user)], axis=-1)


@pytest.fixture(scope="module")
def games() -> np.ndarray:
    """[N, 2, 3, 2] int64: small ranges, so most games have ties."""
    rng = np.random.default_rng(0)
    size = rng.integers(1, 6, (N, 1, 1, 1))
    return rng.integers(-size, size + 1, (N, 2, 3, 2))


@pytest.fixture(scope="module")
def solved(games) -> equilibrium.Equilibria:
    found = jax.jit(jax.vmap(equilibrium.mixed_nash))(np.float32(games) / 10)  # decimals floats cannot hold
    return jax.device_get(found)


def best_replies(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Best columns [n, c] against row weights [n, r] under table [n, r, c], in whole numbers."""
    value = (weights[:, :, None] * table).sum(1)
    return value == value.max(1, keepdims=True)


def key(weights: np.ndarray) -> np.ndarray:
    """Whole weights [n, m] as probabilities [n, m] that compare exactly after rounding to 1e-4."""
    return np.round(weights / np.maximum(weights.sum(1, keepdims=True), 1), 4)


def candidates(table: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weights [n, r], ok [n]) of every pure row and every two rows at which two columns tie.

    Rows mix over r, columns tie under table [n, r, c]; two rows are enough when c or r is 2.
    """
    n, rows, columns = table.shape
    found = [(np.tile(np.eye(rows, dtype=int)[i], (n, 1)), np.ones(n, bool)) for i in range(rows)]
    for i, j in itertools.combinations(range(rows), 2):
        for a, b in itertools.combinations(range(columns), 2):
            first, second = table[:, i, a] - table[:, i, b], table[:, j, a] - table[:, j, b]
            weights = np.zeros((n, rows), int)
            weights[:, i], weights[:, j] = np.abs(second), np.abs(first)
            ok = first * second < 0
            replies = best_replies(weights, table)
            found.append((weights, ok & replies[:, a] & replies[:, b]))
    return found


def brute_force(games: np.ndarray) -> list[set]:
    """Per game the pairs of vertex strategies that are equilibria, by testing every pair."""
    users = candidates(games[..., LLM])
    llms = candidates(games[..., USER].swapaxes(1, 2))
    found = [set() for _ in games]
    for x, x_ok in users:
        x_replies = best_replies(x, games[..., LLM])
        for y, y_ok in llms:
            y_replies = best_replies(y, games[..., USER].swapaxes(1, 2))
            nash = x_ok & y_ok & (x_replies | (y == 0)).all(1) & (y_replies | (x == 0)).all(1)
            pairs = np.concatenate([key(x), key(y)], axis=1)
            for index in np.flatnonzero(nash):
                found[index].add(tuple(pairs[index]))
    return found


def test_the_frontier_is_what_no_cell_dominates(games):
    cells = games.reshape(N, 6, 2)
    dominated = np.zeros((N, 6), bool)
    for mine, other in itertools.permutations(range(6), 2):
        no_worse = (cells[:, other] >= cells[:, mine]).all(-1)
        dominated[:, mine] |= no_worse & (cells[:, other] != cells[:, mine]).any(-1)
    found = jax.jit(jax.vmap(payoff.pareto_frontier))(np.float32(games))
    np.testing.assert_array_equal(found, ~dominated.reshape(N, 2, 3))


def test_pure_equilibria_are_the_cells_nobody_leaves(games):
    expected = np.ones((N, 2, 3), bool)
    for u, a in itertools.product(range(2), range(3)):
        for move in range(2):
            expected[:, u, a] &= games[:, u, a, USER] >= games[:, move, a, USER]
        for action in range(3):
            expected[:, u, a] &= games[:, u, a, LLM] >= games[:, u, action, LLM]
    found = jax.jit(jax.vmap(equilibrium.pure_nash))(np.float32(games))
    np.testing.assert_array_equal(found, expected)


def test_mixed_equilibria_are_exactly_those_of_brute_force(games, solved):
    assert solved.mask.shape == (N, 30)
    strategies = np.round(np.concatenate([solved.user, solved.llm], axis=-1).astype(np.float64), 4)
    found = [[tuple(row) for row in rows[mask]] for rows, mask in zip(strategies, solved.mask, strict=True)]
    assert all(len(rows) == len(set(rows)) for rows in found)  # each once
    assert [set(rows) for rows in found] == brute_force(games)


def test_pure_equilibria_are_among_the_mixed_ones(games, solved):
    pure = equilibrium.pure_nash(np.float32(games))
    chance = solved.user[..., :, None] * solved.llm[..., None, :]
    listed = np.any((chance == 1.0) & solved.mask[..., None, None], axis=1)
    np.testing.assert_array_equal(listed, pure)


def test_values_are_expected_payoffs_and_empty_slots_are_harmless(games, solved):
    value = np.einsum("neu,nea,nuap->nep", solved.user, solved.llm, games / 10)
    np.testing.assert_allclose(solved.value, value * solved.mask[..., None], atol=1e-6)
    for strategy in (solved.user, solved.llm):
        np.testing.assert_allclose(strategy.sum(-1), 1.0, rtol=1e-6)


def test_a_game_without_ties_has_an_odd_number_of_equilibria_with_supports_of_one_size(solved):
    # Wilson's theorem; a degenerate game always has an equilibrium too (Nash).
    count = solved.mask.sum(-1)
    assert count.min() >= 1
    plain = ~solved.degenerate
    assert 2000 < plain.sum() < 8000
    assert (count[plain] % 2 == 1).all()
    sizes = (solved.user > 0).sum(-1), (solved.llm > 0).sum(-1)
    assert (sizes[0] == sizes[1])[plain][solved.mask[plain]].all()


def test_degenerate_games_are_those_with_more_best_replies_than_moves(games, solved):
    expected = np.zeros(N, bool)
    for table in (games[..., LLM], games[..., USER].swapaxes(1, 2)):
        for weights, ok in candidates(table):
            expected |= ok & (best_replies(weights, table).sum(1) > (weights > 0).sum(1))
    np.testing.assert_array_equal(solved.degenerate, expected)


def test_a_degenerate_game_lists_the_ends_of_its_continuum():
    # The user never cares; the LLM prefers DA exactly while the user plays VQ with at least 1/2.
    matrix = game(user=np.zeros((2, 2)), llm=[[1, 0], [0, 1]])
    found = mixed_nash(matrix)
    assert found.degenerate
    slots = [np.asarray(x) for x in (found.user, found.llm, found.mask)]
    listed = {(tuple(x), tuple(y)) for x, y, ok in zip(*slots, strict=True) if ok}
    ends = {((1.0, 0.0), (1.0, 0.0)), ((0.0, 1.0), (0.0, 1.0))}
    middle = {((0.5, 0.5), (1.0, 0.0)), ((0.5, 0.5), (0.0, 1.0))}
    assert listed == ends | middle


def test_rock_paper_scissors_and_matching_pennies_are_mixed():
    beats = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    found = mixed_nash(game(beats, -beats))
    assert found.mask.sum() == 1 and not found.degenerate
    slot = int(np.argmax(found.mask))
    np.testing.assert_allclose(found.user[slot], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(found.llm[slot], 1 / 3, rtol=1e-6)
    pennies = mixed_nash(game([[1, -1], [-1, 1]], [[-1, 1], [1, -1]]))
    slot = int(np.argmax(pennies.mask))
    assert pennies.mask.sum() == 1 and pennies.user[slot].tolist() == [0.5, 0.5]
    assert not equilibrium.pure_nash(game([[1, -1], [-1, 1]], [[-1, 1], [1, -1]])).any()


@pytest.mark.parametrize("n", [3, 5])
def test_a_coordination_game_has_one_equilibrium_for_every_set_of_moves(n):
    found = jax.device_get(mixed_nash(game(np.eye(n), np.eye(n))))
    assert found.mask.sum() == 2**n - 1 and not found.degenerate
    user, llm = found.user[found.mask], found.llm[found.mask]
    np.testing.assert_allclose(user, llm, atol=1e-6)
    support = user > 0
    assert len(np.unique(support, axis=0)) == 2**n - 1
    np.testing.assert_allclose(user, support / support.sum(1, keepdims=True), atol=1e-6)


def test_larger_games_list_true_equilibria_and_an_odd_number_of_them():
    tables = np.random.default_rng(1).integers(-5, 6, (2000, 3, 4, 2))
    found = jax.device_get(mixed_nash(np.float32(tables)))
    chance_user, chance_llm = found.user.astype(np.float64), found.llm.astype(np.float64)
    replies_llm = np.einsum("neu,nua->nea", chance_user, tables[..., LLM])
    replies_user = np.einsum("nea,nua->neu", chance_llm, tables[..., USER])
    gain = np.maximum(
        replies_llm.max(-1) - (replies_llm * chance_llm).sum(-1),
        replies_user.max(-1) - (replies_user * chance_user).sum(-1),
    )
    assert np.max(gain[found.mask]) < 1e-5
    count = found.mask.sum(-1)
    assert count.min() >= 1 and (count[~found.degenerate] % 2 == 1).all() and (~found.degenerate).sum() > 300


@pytest.mark.parametrize("optimistic", [True, False])
def test_commitment_is_the_best_of_all_actions(games, optimistic):
    moves, actions = jax.jit(jax.vmap(lambda g: equilibrium.stackelberg(g, optimistic)))(np.float32(games))
    sign = 1 if optimistic else -1
    for table, move, action in zip(games.tolist(), moves.tolist(), actions.tolist(), strict=True):
        reply = [
            max((0, 1), key=lambda u: (table[u][a][USER], sign * table[u][a][LLM], -u)) for a in range(3)
        ]
        best = max(range(3), key=lambda a: (table[reply[a]][a][LLM], table[reply[a]][a][USER], -a))
        assert (move, action) == (reply[best], best)


def test_mixed_commitment_beats_a_fine_grid_and_is_answered_by_a_best_reply(games):
    some = games[:300]
    llm, move, value = jax.device_get(jax.jit(equilibrium.stackelberg_mixed)(np.float32(some)))
    share = np.array([(a, b, 60 - a - b) for a in range(61) for b in range(61 - a)])  # in sixtieths
    user = np.einsum("ga,nua->ngu", share, some[..., USER])
    own = np.einsum("ga,nua->ngu", share, some[..., LLM]) / 60
    grid = np.where(user == user.max(-1, keepdims=True), own, -np.inf).max((1, 2))
    assert (value[:, LLM] >= grid - 1e-5).all()
    # A grid of sixtieths is close to the optimum: 3 actions, payoffs within [-5, 5].
    assert (value[:, LLM] <= grid + 0.5).all()
    replies = np.einsum("na,nua->nu", llm.astype(np.float64), some[..., USER])
    rows = np.arange(len(some))
    assert (replies[rows, move] >= replies.max(-1) - 1e-5).all()
    want = np.einsum("na,nap->np", llm, some[rows, move])
    np.testing.assert_allclose(value, want, atol=1e-5)


def test_dilemmas():
    paper = game(user=[[1, -1, 3], [0, -1, 3]], llm=[[1, 0, 0], [4, 0, 3]])
    assert not equilibrium.prisoners_dilemma(paper)
    classic = game(user=[[1, 4], [0, 3]], llm=[[1, 0], [4, 3]])
    assert equilibrium.prisoners_dilemma(classic) and equilibrium.social_dilemma(classic)
    user, llm = equilibrium.dominant_strategies(classic)
    assert user.tolist() == [True, False] and llm.tolist() == [True, False]
    # With a third action, dominated by DA, the dilemma stays; when the good cell is made worse, it goes.
    wide = game(user=[[1, 1, 4], [0, 0, 3]], llm=[[1, 0, 0], [4, 0, 3]])
    assert equilibrium.prisoners_dilemma(wide)
    assert not equilibrium.prisoners_dilemma(game([[1, 4], [0, 1]], [[1, 0], [4, 1]]))
    # Stag hunt: the bad equilibrium is improvable, the good one is not.
    hunt = game(user=[[2, 1], [0, 4]], llm=[[2, 0], [1, 4]])
    assert not equilibrium.social_dilemma(hunt)
    assert not equilibrium.social_dilemma(game([[1, -1], [-1, 1]], [[-1, 1], [1, -1]]))  # no pure equilibrium


def test_improvable_and_dominant_moves_against_brute_force(games):
    cells = games.reshape(N, 6, 2)
    worse = (cells[:, None] > cells[:, :, None]).all(-1).any(-1).reshape(N, 2, 3)
    np.testing.assert_array_equal(equilibrium.improvable(np.float32(games)), worse)
    user, llm = equilibrium.dominant_strategies(np.float32(games))
    for u in range(2):
        want = (games[:, u, :, USER] > games[:, 1 - u, :, USER]).all(1)
        np.testing.assert_array_equal(user[:, u], want)
    for a in range(3):
        others = [b for b in range(3) if b != a]
        want = (games[:, :, [a], LLM] > games[:, :, others, LLM]).all((1, 2))
        np.testing.assert_array_equal(llm[:, a], want)


def test_price_of_anarchy(games):
    classic = game(user=[[1, 4], [0, 3]], llm=[[1, 0], [4, 3]])
    assert price_of_anarchy(classic) == pytest.approx(8 / 6)  # (3, 3) over (1, 1), from -5
    assert price_of_anarchy(classic, floor=1.0) == np.inf
    assert price_of_anarchy(np.full((2, 3, 2), -5.0, np.float32)) == 1.0
    # In matching pennies the one equilibrium spreads evenly over both kinds of cells.
    pennies = game([[4, 0], [0, 4]], [[0, 1], [1, 0]])
    mean = (np.sqrt(9 * 5) + np.sqrt(5 * 6)) / 2
    assert price_of_anarchy(pennies) == pytest.approx(np.sqrt(45) / mean)
    prices = jax.vmap(price_of_anarchy)(np.float32(games[:2000]))
    assert (prices >= 1).all() and (prices > 1.2).any()


def test_batch_axes_of_any_shape_and_no_recompilation_for_values(games):
    batch = np.float32(games[:12]).reshape(3, 4, 2, 3, 2)
    traces = []

    @jax.jit
    def solve(x):
        traces.append(1)
        return equilibrium.mixed_nash(x), equilibrium.stackelberg(x), payoff.welfare_optimal(x)

    nash, leader, optimal = solve(batch)
    assert nash.mask.shape == (3, 4, 30) and nash.degenerate.shape == (3, 4) == leader[0].shape
    one = solve(batch)[0].mask[1, 2]
    np.testing.assert_array_equal(one, mixed_nash(batch[1, 2]).mask)
    assert len(traces) == 1 and optimal[0].dtype == jnp.int32
