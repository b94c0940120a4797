"""Evaluated models prompt by prompt: what each was worth on the same one, and what it wrote."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.evaluation.paired import by_prompt, paired_difference
from gtalign_jax.evaluation.report.samples import describe

_REWARDS = ("utility", "user_reward", "llm_reward")
_Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An evaluated model of a run and the lines of its newest evaluation."""

    run: str
    model: str
    lines: Sequence[_Line]


def compare(contenders: Sequence[Contender], shown: int = 200, max_chars: int = 8000) -> dict[str, Any]:
    """What the item-by-item view reads.

    pairs: for each two with common prompts {a, b, mean, lo, hi, prompts, wins, losses}, of the differences
    W(b) - W(a) over all common prompts, with a 95 % interval; a win is b's. Completions of one prompt are
    averaged. items: at most `shown` prompts, those on which welfare differs most, in recorded order; total:
    how many prompts two or more contenders have in common.
    """
    means = {reward: by_prompt([c.lines for c in contenders], reward) for reward in _REWARDS}
    welfare = means["utility"]
    met = Counter(prompt for each in welfare for prompt in each)
    common = [prompt for prompt, times in met.items() if times > 1]

    def spread(prompt: str) -> float:
        values = [each[prompt] for each in welfare if prompt in each]
        return max(values) - min(values)

    chosen = set(sorted(common, key=spread, reverse=True)[:shown])
    sides = [
        _sides(contender.lines, {reward: means[reward][i] for reward in _REWARDS}, chosen, max_chars)
        for i, contender in enumerate(contenders)
    ]
    return {
        "contenders": [{"run": c.run, "model": c.model} for c in contenders],
        "pairs": [pair for pair in _pairs(contenders, welfare) if pair["prompts"]],
        "items": [_item([side.get(prompt) for side in sides]) for prompt in common if prompt in chosen],
        "total": len(common),
    }


def _pairs(contenders: Sequence[Contender], welfare: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The pairs of `compare`, also those without a common prompt."""
    pairs = []
    for a, b in itertools.combinations(range(len(contenders)), 2):
        found = paired_difference([contenders[b].lines], [contenders[a].lines], "utility", n_boot=1000)
        gains = [welfare[b][prompt] - welfare[a][prompt] for prompt in welfare[a].keys() & welfare[b].keys()]
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        numbers = {name: getattr(found, name) for name in ("mean", "lo", "hi", "prompts")}
        pairs.append({"a": a, "b": b, **numbers, "wins": wins, "losses": losses})
    return pairs


def _sides(
    lines: Sequence[_Line], means: Mapping[str, Mapping[str, float]], chosen: set[str], max_chars: int
) -> dict[str, dict[str, Any]]:
    """Of each chosen prompt: means over its completions, how many they are, and the first as a sample."""
    judged = [line for line in lines if line["input"] in chosen and line.get("utility") is not None]
    count = Counter(line["input"] for line in judged)
    first = {line["input"]: line for line in reversed(judged)}
    samples = describe([("", line["step"], line) for line in first.values()], max_chars)
    return {
        prompt: {
            "means": {reward: means[reward].get(prompt) for reward in _REWARDS},
            "completions": count[prompt],
            "sample": sample,
        }
        for prompt, sample in zip(first, samples, strict=True)
    }


def _item(sides: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One prompt: {task, prompt, truth, sides}; a side is None where a contender was not asked."""
    same = ("task", "prompt", "truth")  # said once, for all of them
    samples = [side["sample"] for side in sides if side]
    shared = {name: samples[0][name] for name in same}
    for sample in samples:
        for name in same:
            del sample[name]
    return {**shared, "sides": list(sides)}
