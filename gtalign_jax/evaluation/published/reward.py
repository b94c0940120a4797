"""The published reward formulas (paper section 3) on host float64, for every variant.

The formulas are those of `rewards.mutual_welfare`; what differs is the precision, and that nothing is
checked: a NaN or infinite P passes through, and a negative L has no real welfare.
"""

import dataclasses

import numpy as np

from gtalign_jax.evaluation.published.chain import Matrix

EPS = 1e-4
FRONTIER = "cobb_douglas_frontier"
VARIANTS = ("cobb_douglas", "linear", "user", "llm", FRONTIER)
# Outside the training tasks only the evaluation variant exists, and it keeps the training form of L.
OUT_OF_DOMAIN = frozenset(("minerva_math", "ambig_coqa", "advbench"))


@dataclasses.dataclass(frozen=True)
class Measures:
    """What the formulas are made of, [B] float64 each (bool for the flags).

    due: a response and a matrix were found. format_ok: F. payoff: M. answer_user, answer_llm, answer:
    Q_u, Q_l and the reported score. frontier: P, not clamped. in_domain: the task is one of training's.
    reasoning_chars, response_words, total_words: counts.
    """

    due: np.ndarray
    format_ok: np.ndarray
    payoff: np.ndarray
    answer_user: np.ndarray
    answer_llm: np.ndarray
    answer: np.ndarray
    frontier: np.ndarray
    in_domain: np.ndarray
    reasoning_chars: np.ndarray
    response_words: np.ndarray
    total_words: np.ndarray


def payoff_score(payoff: Matrix) -> float:
    """M of a matrix, in Python's own arithmetic: 1/12 for payoffs that differ, 1/12 when by over a tenth.

    Raises OverflowError as the published code does, when an integer beyond float meets a float. `max`
    keeps its first argument against NaN, which decides the score of a NaN payoff.
    """
    score = 0.0
    for cell in payoff.values():
        user, llm = cell["user"], cell["LLM"]
        if user != llm:
            score += 1 / 12
        if abs(user - llm) / max(abs(user), abs(llm), 1e-8) > 0.1:
            score += 1 / 12
    return score


def band(words: np.ndarray, low: float, high: float) -> np.ndarray:
    """sigmoid(k (n - low)) sigmoid(k (high - n)) with k = 0.005, [B] float64."""
    return 1 / ((1 + np.exp(-0.005 * (words - low))) * (1 + np.exp(-0.005 * (high - words))))


def utilities(m: Measures, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """(U, L) [B] float64, zero where no reward is due."""
    reply, whole = band(m.response_words, 20, 500), band(m.total_words, 500, 1000)
    user = EPS + 0.5 * m.answer_user + 0.2 * reply + 0.3 * np.exp(-m.reasoning_chars / 500)
    base = EPS + 0.2 * m.format_ok + 0.2 * m.payoff
    llm = base + 0.4 * m.answer_llm + 0.2 * whole
    if variant == FRONTIER:
        evaluation = base + 0.2 * m.frontier + 0.35 * m.answer_llm + 0.05 * whole
        llm = np.where(m.in_domain, evaluation, llm)
    return np.where(m.due, user, 0.0), np.where(m.due, llm, 0.0)


def formulas(m: Measures, variant: str) -> dict[str, np.ndarray]:
    """The fields the published code returns for a variant, [B] float64 each.

    score is what it trains on, utility the welfare W; W is NaN where L is negative (there the published
    code holds a complex number). Outside the evaluation variant format_reward is 0.1 F + 0.15 M and
    neither M nor P is returned. Raises ValueError for a variant it does not have.
    """
    if variant not in VARIANTS:
        raise ValueError(f"{variant!r}: the published variants are {', '.join(VARIANTS)}")
    user, llm = utilities(m, variant)
    with np.errstate(invalid="ignore"):
        welfare = np.sqrt(user * llm)
        scores = {"linear": (user + llm) / 2, "user": user, "llm": llm}
        gap = np.abs(user - llm)
    format_ok, payoff, answer = (np.where(m.due, x, 0.0) for x in (m.format_ok, m.payoff, m.answer))
    fields = {
        "score": scores.get(variant, welfare),
        "answer_reward": answer,
        "format_reward": 0.1 * format_ok + 0.15 * payoff,
        "user_reward": user,
        "llm_reward": llm,
        "utility": welfare,
        "reward_gap": gap,
    }
    if variant == FRONTIER:
        frontier = np.where(m.due & m.in_domain, m.frontier, 0.0)
        fields |= {"format_reward": format_ok, "payoff_reward": payoff, "pareto_score": frontier}
    return fields
