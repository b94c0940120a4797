"""A data set steered at several prices: what each does to choice, welfare, length and bill."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.chain.parse import parse_chain
from gtalign_jax.config import load_symbol
from gtalign_jax.errors import UserError
from gtalign_jax.game.break_even import Flip, break_even
from gtalign_jax.game.moves import ACTIONS, AQ, CQ, DA, GTALIGN
from gtalign_jax.game.payoff import cell_welfare
from gtalign_jax.game.pricing import POLICIES, STEP, TYPICAL, Amounts, Policy, as_written
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.steer import Branch, Edit, Steered

BELOW, ABOVE = "below", "above"
NEAR = 1e-3  # of a break-even price: just below and just above it
Point = float | str


@dataclasses.dataclass(frozen=True)
class Pricing:
    """A policy by name, with what each action makes the assistant write; step: of the edited payoffs."""

    name: str
    policy: Policy
    amounts: Amounts = TYPICAL
    step: float = STEP

    def edit(self, payoff: np.ndarray, price: float) -> np.ndarray:
        return np.asarray(self.policy(payoff, price, self.amounts), np.float64)

    def flips(self, payoff: np.ndarray) -> tuple[Flip, ...]:
        """Where the choice flips, of the matrix as models read it."""
        return break_even(payoff, self.edit, written=True, step=self.step)


def named_policy(name: str, where: str) -> Policy:
    """A policy of the library, or the function (payoff, price, amounts) at `module:function`."""
    if name in POLICIES:
        return POLICIES[name]
    if ":" not in name:
        raise UserError(f"{where}={name!r}: use one of {', '.join(POLICIES)}, or module:function")
    return load_symbol(name, where)


def read_point(text: str, where: str) -> Point:
    """A price, or `below` or `above`: just beside the price at which each prompt's own matrix flips."""
    if text in (BELOW, ABOVE):
        return text
    try:
        price = float(text)
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is no price; write numbers, {BELOW} or {ABOVE}") from error
    if not np.isfinite(price):
        raise UserError(f"{where}: {text!r} must be finite")
    return price


def price_of(pricing: Pricing, point: Point, payoff: np.ndarray) -> float | None:
    """The price of a point for a matrix [U, A, 2]; None beside a break-even that it does not have."""
    if not isinstance(point, str):
        return point
    flips = [flip for flip in pricing.flips(payoff) if flip.price > NEAR]
    return None if not flips else flips[0].price + (NEAR if point == ABOVE else -NEAR)


def point_edit(pricing: Pricing, point: Point) -> Edit:
    """The edit of a point, as it is written; none where the matrix has no break-even."""

    def edit(payoff: np.ndarray) -> np.ndarray:
        price = price_of(pricing, point, payoff)
        return payoff if price is None else as_written(pricing.edit(payoff, price), pricing.step)

    return edit


def point_lines(steered: Steered, pricing: Pricing, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """A line a point: what the edited matrix recommends, what the model then did, and what it costs.

    action: said in <analyze>; recommended: by the edited matrix; follows: whether what was said is that, or
    exactly as good; obeys: whether the response does what was said; welfare: of the said action's best cell;
    cost: price x tokens of that action, both None without one; n_tokens: of the whole sequence.
    """
    written = steered.original.payoff
    for number, point in enumerate(points):
        if steered.failure is not None or written is None:
            text, n_tokens = steered.original.text, len(steered.original.token_ids)
            yield {"at": point, "failure": steered.failure, "text": text, "n_tokens": n_tokens}
            continue
        branch, price = steered.edited[number], price_of(pricing, point, written)
        assert branch.payoff is not None  # an edited branch has the matrix it was edited to
        best = solution(branch.payoff)
        yield {
            "at": point,
            "price": price,
            "payoff": branch.payoff.tolist(),
            "recommended": best["action"],
            **_outcome(branch, branch.payoff[GTALIGN.cell(best["cell"])], pricing, price),
            "n_tokens": len(branch.token_ids),
            "text": branch.text,
        }


def _outcome(branch: Branch, best: np.ndarray, pricing: Pricing, price: float | None) -> dict[str, Any]:
    """best [2]: the payoffs of the recommended cell; an action with such a cell is as good as it."""
    if branch.action is None or branch.payoff is None:
        return {"action": None, "follows": False, "obeys": False, "welfare": None, "cost": None}
    action = ACTIONS.index(branch.action)
    welfare = float(np.max(cell_welfare(branch.payoff)[:, action]))
    cost = None if price is None else price * pricing.amounts.tokens[action]
    did = action_of_response(parse_chain(branch.text).response or "")
    return {
        "action": branch.action,
        "follows": bool(np.any(np.all(branch.payoff[:, action] == best, axis=-1))),
        "obeys": did == branch.action,
        "welfare": welfare,
        "cost": cost,
    }


def action_of_response(response: str) -> str | None:
    """What a response does, by its sentences: a question alone is CQ, one after an answer AQ, none DA."""
    sentences = re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", response.strip())
    if not sentences:
        return None
    questions = [sentence.rstrip().endswith("?") for sentence in sentences]
    return DA if not questions[-1] else CQ if all(questions) else AQ


def read_amounts(text: str | None, tokens_per_s: float) -> Amounts:
    """The amounts of --amounts: three numbers, or those of a rollout file; typical ones for None."""
    if text is None:
        return TYPICAL
    try:
        given = tuple(float(number) for number in text.split(","))
    except ValueError:
        return learn_amounts(jsonl.read(text), text, tokens_per_s)
    if len(given) != len(ACTIONS) or not all(0 <= number < float("inf") for number in given):
        raise UserError(f"--amounts={text}: three numbers, for {', '.join(ACTIONS)}, or a rollout file")
    return Amounts(given, given, given)


def learn_amounts(lines: Iterable[Mapping[str, Any]], path: str, tokens_per_s: float) -> Amounts:
    """The mean amounts of each action in a run's rollout lines: 1 000 tokens, 1 000 characters, seconds.

    UserError when an action was never taken.
    """
    seen: dict[str, list[tuple[float, float]]] = {action: [] for action in ACTIONS}
    for line in lines:
        if line.get("action") in GTALIGN.keys + GTALIGN.actions:
            _, action = GTALIGN.split(line["action"])
            seen[action].append((float(line["n_tokens"]), float(len(line["output"]))))
    if never := [action for action, found in seen.items() if not found]:
        raise UserError(f"{path}: no line with the action {never[0]}; give three numbers for DA, CQ and AQ")
    tokens, characters = np.array([np.mean(seen[action], axis=0) for action in ACTIONS]).T
    return Amounts(*(tuple(x.tolist()) for x in (tokens / 1000, characters / 1000, tokens / tokens_per_s)))
