"""Prices of a sweep, what a line says, and the curve over them."""

import numpy as np
import pytest

from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.steering import format_curve, save_curve, steering_curve
from gtalign_jax.game.moves import ACTIONS
from gtalign_jax.game.pricing import Amounts, per_token
from gtalign_jax.serving import sweep
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import Splice
from gtalign_jax.serving.steer import Branch, Steered
from gtalign_jax.serving.sweep import Pricing

PRICING = Pricing("per_token", per_token, Amounts(tokens=(1.0, 0.25, 1.25)))
FLIPS = np.full((2, 3, 2), -5.0)
FLIPS[1, 0], FLIPS[1, 1] = (2.0, 3.0), (2.0, 2.0)  # an answer, until a question is the better for its price
SAYS = {"DA": "At 9.", "CQ": "Which one?", "AQ": "At 9. Which one?"}
NEVER = np.full((2, 3, 2), -5.0)
NEVER[1, 1] = (4.0, 4.0)


def branch(payoff, action):
    text = format_chain("Why?", payoff, f"I choose {action}.", SAYS[action]) if action else ""
    return Branch(payoff, action, text, (1, 2, 3), Splice((1,), 1), 0.5)


def lines_of(payoff, actions, points, number):
    edits = [sweep.point_edit(PRICING, point)(payoff) for point in points]
    branches = tuple(branch(edit, action) for edit, action in zip(edits, actions, strict=True))
    steered = Steered(branch(payoff, "DA"), branches)
    return [{"id": number, **line} for line in sweep.point_lines(steered, PRICING, points)]


def test_just_below_and_just_above_its_break_even_a_matrix_recommends_another_action():
    below, above = (sweep.point_edit(PRICING, point)(FLIPS) for point in (sweep.BELOW, sweep.ABOVE))
    assert (solution(below)["action"], solution(above)["action"]) == ("DA", "CQ")
    gap = sweep.price_of(PRICING, sweep.ABOVE, FLIPS) - sweep.price_of(PRICING, sweep.BELOW, FLIPS)
    assert gap == pytest.approx(2 * sweep.NEAR)
    assert sweep.price_of(PRICING, sweep.ABOVE, NEVER) is None
    np.testing.assert_array_equal(sweep.point_edit(PRICING, sweep.ABOVE)(NEVER), NEVER)


def test_in_halves_an_edit_is_halves_and_still_flips_beside_its_break_even():
    halves = Pricing("per_token", per_token, PRICING.amounts, step=0.5)
    below, above = (sweep.point_edit(halves, point)(FLIPS) for point in (sweep.BELOW, sweep.ABOVE))
    assert (solution(below)["action"], solution(above)["action"]) == ("DA", "CQ")
    np.testing.assert_array_equal(np.stack([below, above]) % 0.5, 0)
    assert np.abs(below - above).max() == 0.5


def test_a_line_says_what_was_recommended_said_and_paid():
    free, dear = lines_of(FLIPS, ["DA", "DA"], [0.0, 4.0], 7)
    assert (free["recommended"], free["action"], free["cost"], free["n_tokens"]) == ("DA", "DA", 0.0, 3)
    assert free["obeys"] and dear["obeys"]
    assert free["follows"] and not dear["follows"]
    tied = np.full((2, 3, 2), 1.0)
    (line,) = lines_of(tied, ["AQ"], [0.0], 8)
    assert (line["recommended"], line["action"], line["follows"]) == ("DA", "AQ", True)
    assert (dear["recommended"], dear["action"], dear["cost"]) == ("CQ", "DA", 4.0)
    assert free["welfare"] == pytest.approx(np.sqrt(7 * 8)) and dear["welfare"] == pytest.approx(
        np.sqrt(7 * 4)
    )


def test_the_curve_counts_shares_of_what_was_steered(tmp_path):
    points = [0.0, 4.0, sweep.ABOVE]
    lines = lines_of(FLIPS, ["DA", "CQ", "CQ"], points, 0) + lines_of(NEVER, ["CQ", "DA", "CQ"], points, 1)
    unsteered = Steered(branch(None, None), failure="no matrix")
    lines += [{"id": 2, **line} for line in sweep.point_lines(unsteered, PRICING, points)]
    curve = steering_curve(lines)
    means = {
        point: {name: row[name]["mean"] for name in ("steered", *ACTIONS, "follows")}
        for point, row in curve.items()
    }
    assert means[0.0] == pytest.approx({"steered": 2 / 3, "DA": 0.5, "CQ": 0.5, "AQ": 0.0, "follows": 1.0})
    assert means[4.0] == pytest.approx({"steered": 2 / 3, "DA": 0.5, "CQ": 0.5, "AQ": 0.0, "follows": 0.5})
    assert curve[sweep.ABOVE]["CQ"]["n"] == 1  # the other matrix has no break-even
    text = format_curve(curve)
    assert text.splitlines()[0].split()[:3] == ["price", "steered", "DA"] and "Fewer than 20 prompts" in text
    save_curve(curve, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.count("<svg") == 1
    save_curve(curve, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text() == drawn


def test_amounts_are_learned_from_what_a_run_wrote():
    lines = [
        {"action": "DA", "n_tokens": 100, "output": "x" * 400},
        {"action": "DQ_DA", "n_tokens": 300, "output": "x" * 600},
        {"action": "CQ", "n_tokens": 50, "output": "x" * 100},
        {"action": None, "n_tokens": 999, "output": ""},
    ]
    with pytest.raises(UserError, match="r.jsonl: no line with the action AQ"):
        sweep.learn_amounts(lines, "r.jsonl", 50.0)
    lines.append({"action": "AQ", "n_tokens": 400, "output": "x" * 800})
    amounts = sweep.learn_amounts(lines, "r.jsonl", 50.0)
    assert amounts.tokens == pytest.approx((0.2, 0.05, 0.4))
    assert amounts.characters == pytest.approx((0.5, 0.1, 0.8))
    assert amounts.seconds == pytest.approx((4.0, 1.0, 8.0))


@pytest.mark.parametrize(
    ("response", "action"),
    [
        *((text, action) for action, text in SAYS.items()),
        (" ", None),
        ("a 1.5", "DA"),
        ("Who? Why?", "CQ"),
        ("Yes! No", "DA"),
    ],
)
def test_a_response_is_read_by_its_sentences(response, action):
    assert sweep.action_of_response(response) == action


@pytest.mark.parametrize("text", ["", "dear", "nan", "inf"])
def test_a_price_that_is_none_is_named(text):
    with pytest.raises(UserError, match="--prices: "):
        sweep.read_point(text, "--prices")


def test_a_policy_of_ones_own_is_taken_by_its_path():
    assert sweep.named_policy("gtalign_jax.game.pricing:latency", "--policy").__name__ == "latency"
    with pytest.raises(UserError, match="--policy='free': use one of per_token"):
        sweep.named_policy("free", "--policy")
