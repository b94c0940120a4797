"""Classic games: solutions beside closed forms and brute force, environments by their rules, self-play."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.game.classic import bargaining, dilemma, play, signalling

payoffs = st.lists(st.integers(-20, 20), min_size=4, max_size=4, unique=True).map(sorted)
chances = st.integers(1, 19).map(lambda n: n / 20)


def certain(env, chosen):
    """Logits [2, O, A] of a policy that always takes `chosen` [2, O]."""
    return jnp.where(jax.nn.one_hot(jnp.asarray(chosen), env.legal.shape[1]) > 0, 0.0, -1e9)


@given(payoffs)
def test_in_a_dilemma_defection_is_the_one_subgame_perfect_play(values):
    sucker, punishment, reward, temptation = map(float, values)
    game = dilemma.Dilemma(temptation, reward, punishment, sucker)
    perfect = []
    for first, replies in itertools.product((0, 1), itertools.product((0, 1), repeat=2)):
        worth = game.table[[0, 1], list(replies)]
        best_replies = all(game.table[i, replies[i], 1] >= game.table[i, :, 1].max() for i in (0, 1))
        if best_replies and worth[first, 0] >= worth[:, 0].max():
            perfect.append((first, replies))
    assert perfect == [dilemma.subgame_perfect(game)] == [(dilemma.DEFECT, (dilemma.DEFECT, dilemma.DEFECT))]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
def test_the_dilemma_pays_what_its_table_says(first, second):
    env, game = dilemma.environment(), dilemma.Dilemma()
    played = play.play(env, certain(env, [[first] * 3, [second] * 3]), jax.random.key(0), 2)
    np.testing.assert_array_equal(played.reward.sum(axis=1), [game.table[first, second]] * 2)
    np.testing.assert_array_equal(played.observation[0], [0, 1 + first])


@given(chances, chances)
def test_bargaining_without_a_last_round_is_rubinsteins(first, second):
    game = bargaining.Bargaining((first, second), rounds=2001)
    assert bargaining.shares(game)[0] == pytest.approx(bargaining.rubinstein((first, second)), abs=1e-9)
    assert bargaining.rubinstein((first, first)) == pytest.approx(1 / (1 + first))


def tree_value(game, r=0):
    """(proposer's, other's) worth of the game from round r, as of that round, by the whole tree."""
    if r == game.rounds:
        return 0.0, 0.0
    mine, theirs = (game.discounts[(r + i) % 2] for i in (0, 1))
    next_proposer, next_other = tree_value(game, r + 1)
    outcomes = []
    for offered in range(game.parts + 1):
        share = offered / game.parts
        if share >= theirs * next_proposer - 1e-9:
            outcomes.append((1 - share, share))
        else:
            outcomes.append((mine * next_other, theirs * next_proposer))
    return max(outcomes)


@settings(max_examples=30)
@given(chances, chances, st.integers(1, 4), st.integers(1, 8))
def test_bargaining_in_parts_is_the_trees_solution(first, second, rounds, parts):
    game = bargaining.Bargaining((first, second), rounds, parts)
    assert bargaining.shares_in_parts(game)[0] == pytest.approx(tree_value(game)[0])


def test_bargaining_goes_on_until_an_offer_is_taken_and_shrinks_by_the_round():
    game = bargaining.Bargaining((0.5, 0.8), rounds=3, parts=4)
    env = bargaining.environment(game)
    chosen = np.full((2, len(env.legal)), bargaining.REJECT)
    chosen[0, [0, 2]], chosen[1, 1] = 1, 3  # who proposes offers a quarter, then three
    chosen[0, game.rounds + 1 * 5 + 3] = bargaining.ACCEPT
    played = play.play(env, certain(env, chosen), jax.random.key(0), 1)
    np.testing.assert_array_equal(played.player[0, :4], [0, 1, 1, 0])
    np.testing.assert_array_equal(played.live[0], [True] * 4 + [False] * 2)
    np.testing.assert_allclose(played.reward.sum(axis=1)[0], [0.75 * 0.5, 0.25 * 0.8])


def test_who_never_agrees_gets_nothing():
    env = bargaining.environment(bargaining.Bargaining(rounds=2, parts=2))
    chosen = np.zeros((2, len(env.legal)), int)
    played = play.play(env, certain(env, chosen), jax.random.key(0), 3)
    assert not played.reward.any()


def equilibria(game):
    """(LOW's signal, HIGH's) of every equilibrium, by trying all strategies and beliefs."""
    found = set()
    low, high = game.worth
    for low_buys, high_buys in itertools.product((0, 1), repeat=2):
        for belief in np.linspace(0, 1, 101):  # of a signal that nobody sends
            wage = {}
            for signal in (0, 1):
                kinds = [(1 - game.able) * (low_buys == signal), game.able * (high_buys == signal)]
                share = kinds[1] / sum(kinds) if sum(kinds) else belief
                wage[signal] = (1 - share) * low + share * high
            buys = zip((low_buys, high_buys), game.cost, strict=True)
            if all(wage[s] - c * s >= wage[1 - s] - c * (1 - s) - 1e-9 for s, c in buys):
                found.add((low_buys, high_buys))
    return found


@settings(max_examples=60)
@given(chances, st.lists(st.integers(0, 30), min_size=2, max_size=2, unique=True))
def test_separating_and_pooling_are_found_where_equilibria_are(able, costs):
    high, low = sorted(costs)
    game = signalling.Signalling(cost=(low / 10 + 0.003, high / 10 + 0.001), able=able)  # no ties
    found = equilibria(game)
    assert signalling.separates(game) == ((0, 1) in found)
    assert signalling.pools_plain(game) == ((0, 0) in found)
    assert signalling.pools_on_signal(game) == ((1, 1) in found)


def test_the_employer_is_paid_by_how_near_the_wage_is():
    game = signalling.Signalling(able=0.999999)
    env = signalling.environment(game)
    played = play.play(env, certain(env, [[0, 1, 0, 0], [0, 0, 0, 2]]), jax.random.key(0), 1)
    np.testing.assert_allclose(played.reward.sum(axis=1)[0], [1.5 - game.cost[1], -0.25])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dilemma.Dilemma(reward=6.0), "temptation > reward"),
        (lambda: bargaining.Bargaining(discounts=(1.0, 0.5)), "discounts"),
        (lambda: bargaining.Bargaining(rounds=0), "rounds"),
        (lambda: signalling.Signalling(cost=(0.1, 0.2)), "cost the HIGH kind less"),
        (lambda: signalling.Signalling(able=1.0), "able=1.0"),
    ],
)
def test_games_that_are_none_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_gradient_is_that_of_the_expected_return():
    """Many games, one seed: REINFORCE's mean gradient beside the derivative of the exact expected return."""
    env, game = dilemma.environment(), dilemma.Dilemma()
    logits = jax.random.normal(jax.random.key(1), (2, 3, 2))

    def expected(x):
        first, second = jax.nn.softmax(x[0, 0]), jax.nn.softmax(x[1, 1:])
        chance = first[:, None] * second
        return jnp.stack([jnp.sum(chance * game.table[..., i]) for i in (0, 1)])

    exact = jax.jacobian(expected)(logits)
    played = play.play(env, logits, jax.random.key(0), 20_000)
    sampled = jax.grad(lambda x: play.policy_gradient_loss(env, x, played, 0.0))(logits)
    # Each player climbs its own return; the loss is a mean over two moves a game.
    np.testing.assert_allclose(-2 * sampled[0], exact[0, 0], atol=0.04)
    np.testing.assert_allclose(-2 * sampled[1], exact[1, 1], atol=0.04)


def test_self_play_in_the_dilemma_learns_to_defect():
    env = dilemma.environment()
    curve = jax.jit(lambda key: play.self_play(env, key, 150, episodes=64, lr=0.1))(jax.random.key(0))
    assert curve.policy.shape == (150, 2, 3, 2)
    assert curve.policy[-1, 0, 0, dilemma.DEFECT] > 0.95
    assert curve.earned[-1].tolist() == pytest.approx([1.0, 1.0], abs=0.2)
