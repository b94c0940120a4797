"""The page's rules beside the library's, run in the browser on many matrices."""

import numpy as np
import pytest

from gtalign_jax.game.break_even import break_even
from gtalign_jax.game.moves import ACTIONS, KEYS, USER_MOVES
from gtalign_jax.game.pricing import POLICIES, STEPS, TYPICAL, Amounts, apply_policy, as_written
from gtalign_jax.serving.page import routes
from gtalign_jax.serving.server.ask import Bounds
from gtalign_jax.serving.solution import solution

NAMES = [f"{move}_{action}" for move in USER_MOVES for action in ACTIONS]
AMOUNTS = {"typical": Amounts(), "own": Amounts((0.31, 0.07, 0.9), (0.2, 0.2, 0.6), (3, 0, 2))}


def matrices(count, seed):
    """Of one decimal: anywhere on the scale and beyond, on few values so that much ties, and on the floor."""
    rng = np.random.default_rng(seed)
    shape = (count, 2, 3, 2)
    kinds = (
        rng.uniform(-6, 6, shape),
        rng.integers(-1, 2, shape),
        rng.integers(-10, 11, shape) / 2,
        rng.choice([-5.0, -4.9, 0.0, 5.0], shape),
    )
    return np.concatenate(kinds).round(1) + 0.0


@pytest.fixture
def rules(scripted, visit):
    """rules(script, *given): the script's value with the page's modules in reach."""
    with scripted() as (address, _):
        page = visit(address)

        def run(script, *given):
            return page.evaluate(
                f"""async (given) => {{
                    const solve = await import("/page/solve.js"), stream = await import("/page/stream.js");
                    return ({script})(...given);
                }}""",
                list(given),
            )

        yield run


def cells(payoffs):
    return np.asarray(payoffs).reshape(-1, 6, 2).tolist()


def test_a_matrix_is_solved_as_the_library_solves_it(rules):
    payoffs = matrices(100, 0)
    found = rules(
        """(all) => all.map((cells) => ({
            cell: solve.recommended(cells), frontier: solve.frontier(cells), nash: solve.pureNash(cells),
            mixed: solve.mixedNash(cells), welfare: solve.welfare(cells) }))""",
        cells(payoffs),
    )
    several = 0
    for payoff, one in zip(payoffs, found, strict=True):
        known = solution(payoff)
        assert NAMES[one["cell"]] == known["cell"], payoff
        for part in ("frontier", "nash"):
            assert {name for name, held in zip(NAMES, one[part], strict=True) if held} == set(known[part]), (
                payoff
            )
        assert one["welfare"][one["cell"]] == pytest.approx(known["welfare"], abs=1e-5)
        mixed = [{"user": list(m["user"].values()), "llm": list(m["llm"].values())} for m in known["mixed"]]
        assert len(one["mixed"]) == len(mixed), payoff
        for mine, other in zip(one["mixed"], mixed, strict=True):
            assert mine["user"] == pytest.approx(other["user"], abs=1e-6)
            assert mine["llm"] == pytest.approx(other["llm"], abs=1e-6)
        several += len(mixed) > 1
    assert several > 30


@pytest.mark.parametrize("amounts", AMOUNTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_price_does_what_the_library_does_and_flips_where_it_flips(rules, policy, amounts):
    same_as_the_library(rules, policy, AMOUNTS[amounts], 0.1)


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_coarser_step_rounds_and_flips_as_the_library_does(rules, step):
    same_as_the_library(rules, "per_token", TYPICAL, step)


def same_as_the_library(rules, policy, amounts, step):
    told = routes.settings(Bounds(1, 1, (policy,), amounts, step=step))
    payoffs, prices = matrices(8, 1), [0, 0.04, 0.5, 1, 2.5, 6.25, 40]
    made, flips = rules(
        """(all, policy, unit, prices) => [
            all.map((one) => prices.map((price) => solve.asWritten(solve.priced(one, policy, price), unit))),
            all.map((one) => solve.breakEven(one, policy, unit).map((f) => [f.price, f.before, f.after]))]""",
        cells(payoffs),
        told["policies"][policy],
        told["per_unit"],
        prices,
    )
    for payoff, at_prices, found in zip(payoffs, made, flips, strict=True):
        for price, at in zip(prices, at_prices, strict=True):
            exact = as_written(apply_policy(payoff, policy, price, amounts), step)
            assert np.array_equal(np.reshape(at, payoff.shape), exact), (payoff, price)
        known = break_even(payoff, lambda x, p: apply_policy(x, policy, p, amounts), written=True, step=step)
        assert [flip[1:] for flip in found] == [list(flip[1:]) for flip in known], payoff
        assert [flip[0] for flip in found] == pytest.approx([flip.price for flip in known], abs=1e-6)


def test_blocks_come_as_they_are_written_and_no_tag_is_half_shown(rules):
    text = (
        'Hm <b>\n<thinking>\na < b\n</thinking>\n<payoff>{"x": 1}</payoff><analyze>DA</analyze>\n<response>Y.'
    )
    at_every_end = rules(
        "(text) => [...Array(text.length + 1).keys()].map((n) => stream.blocks(text.slice(0, n)))", text
    )
    shown = [[(block["name"], block["text"]) for block in blocks] for blocks in at_every_end]
    assert shown[-1] == [
        ("outside", "Hm <b>"),
        ("thinking", "a < b"),
        ("payoff", '{"x": 1}'),
        ("analyze", "DA"),
        ("response", "Y."),
    ]
    assert [block["open"] for block in at_every_end[-1]] == [False] * 4 + [True]
    for blocks in shown:
        for (name, part), (_, whole) in zip(blocks, shown[-1], strict=False):
            assert whole.startswith(part) or name == "outside"
            assert "</" not in part and "<t" not in part


def test_a_matrix_is_read_and_written_as_requests_have_it(rules):
    payoff = matrices(1, 2)[0]
    written = {name: {"LLM": x, "user": y} for name, (x, y) in zip(NAMES, cells(payoff)[0], strict=True)}
    asked = {key: written[key] for key in KEYS}
    found, back = rules(
        "(m, names) => [stream.readMatrix(m, names), stream.writeMatrix(stream.readMatrix(m, names), names)]",
        asked,
        NAMES,
    )
    assert found == cells(payoff)[0] and back == written
    wrong = [
        None,
        3,
        "no JSON",
        "[]",
        {**asked, "DA": {"LLM": 1, "user": 1}},
        {**asked, "DQ_DA": {"LLM": "1", "user": 1}},
    ]
    assert rules("(all, names) => all.map((m) => stream.readMatrix(m, names))", wrong, NAMES) == [None] * len(
        wrong
    )


def test_the_action_is_the_last_that_an_analysis_names(rules):
    said = {"choose DQ_AQ, then AQ: not DA": "DA", "AQUA and VQ_CQ.": "CQ", "": None, "DAY": None}
    found = rules(
        "(all, u, a) => all.map((t) => stream.namedAction(t, u, a))",
        list(said),
        list(USER_MOVES),
        list(ACTIONS),
    )
    assert found == list(said.values())
