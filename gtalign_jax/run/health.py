"""Does the run still make sense? A pure check of recent metrics that names the step and likely cause."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.errors import INF, MAX_COUNT, in_range

Record = Mapping[str, Any]  # a line of metrics.jsonl: phase, step and numbers; None stands for not finite

_ROUNDING = 1e-3  # nats, which sampler and trainer may differ by without being different models
_LOSS_NOISE = 0.3  # nats, which the losses of two batches may differ by


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Thresholds; a condition on a mean looks at the last `window` steps.

    kl_limit: KL to the reference, nats per token. entropy_floor: nats per token, and entropy_fraction:
    share of the phase's first window; both must be undercut. format_floor: format rate, after it was at
    least format_healthy once. missing_limit: share of samples without a verdict. flat_limit: share of
    groups without reward variance. nonfinite_patience: non-finite steps in a row that stop the run.
    gap_limit: difference of the sampler's and the trainer's log-probabilities, nats; gap_growth: how many
    times its value in the first window, once it is no rounding error. sft_growth: how many times its first
    value the cold-start loss may be. fluency_fall: nats per token by which the reference may find the
    responses less likely than in the first window while W rises.
    """

    window: int = 5
    kl_limit: float = 1.0
    entropy_floor: float = 0.02
    entropy_fraction: float = 0.2
    format_floor: float = 0.05
    format_healthy: float = 0.3
    missing_limit: float = 0.5
    flat_limit: float = 0.95
    nonfinite_patience: int = 3
    gap_limit: float = 0.02
    gap_growth: float = 100.0
    sft_growth: float = 2.0
    fluency_fall: float = 0.5

    def __post_init__(self) -> None:
        in_range(self, window=(1, MAX_COUNT), nonfinite_patience=(1, MAX_COUNT))
        in_range(self, kl_limit=(0, INF), entropy_floor=(0, INF), entropy_fraction=(0, INF))
        in_range(self, format_floor=(0, 1), format_healthy=(0, 1))
        in_range(self, missing_limit=(0, INF), flat_limit=(0, INF))
        in_range(self, gap_limit=(0, INF), gap_growth=(0, INF), sft_growth=(0, INF))
        in_range(self, fluency_fall=(0, INF))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that went wrong. kind: a rule's name; step: where it began; stop: the run should end."""

    kind: str
    phase: str
    step: int
    message: str
    stop: bool = False

    def __str__(self) -> str:
        return f"health: {self.phase} step {self.step}: {self.message}"


def check(records: Sequence[Record], config: HealthConfig = HealthConfig()) -> tuple[Finding, ...]:
    """What began at the newest record. records: those of one phase so far, oldest first.

    A condition is reported once, at the step where it begins to hold.
    """
    if not records:
        return ()
    return _begun(records, len(records) - 1, _best_format(records), config)


def scan(records: Sequence[Record], config: HealthConfig = HealthConfig()) -> tuple[Finding, ...]:
    """All findings of a recorded run, in order; records may hold several phases."""
    by_phase: dict[str, list[Record]] = {}
    for record in records:
        by_phase.setdefault(record["phase"], []).append(record)
    found: list[Finding] = []
    for part in by_phase.values():
        best = _best_format(part)
        for i in range(len(part)):
            found += _begun(part, i, best, config)
    return tuple(found)


def _best_format(records: Sequence[Record]) -> np.ndarray:
    """The best format rate up to and including each record; zero before the first one."""
    rates = [r.get("reward/format") for r in records]
    return np.maximum.accumulate(np.nan_to_num(np.array([0.0 if x is None else x for x in rates])))


def _begun(
    records: Sequence[Record], i: int, best_format: np.ndarray, config: HealthConfig
) -> tuple[Finding, ...]:
    """Findings that hold at record i and did not at i - 1."""
    now = _active(records, i, best_format[i], config)
    before = _active(records, i - 1, best_format[i - 1], config) if i else {}
    where = records[i]["phase"], int(records[i]["step"])
    return tuple(
        Finding(kind, *where, message, stop=kind == "nonfinite_streak")
        for kind, message in now.items()
        if kind not in before
    )


def _active(records: Sequence[Record], i: int, best_format: float, config: HealthConfig) -> dict[str, str]:
    """Kind to message of every condition that holds at record i."""
    window = records[max(0, i + 1 - config.window) : i + 1]
    found = {
        "nonfinite": _nonfinite(records[i]),
        "nonfinite_streak": _streak(records, i, config),
        "kl": _kl(window, config),
        "entropy": _entropy(records[: config.window], window, config),
        "format": _format(best_format, window, config),
        "judge": _judge(window, config),
        "flat": _flat(window, config),
        "gap": _gap(records[: config.window], window, config),
        "sft": _sft(records[0], records[i], config),
        "hacking": _hacking(records[: config.window], window, config),
    }
    return {kind: message for kind, message in found.items() if message}


def _bad_keys(record: Record) -> list[str]:
    return [k for k, v in record.items() if v is None or (isinstance(v, float) and not math.isfinite(v))]


def _mean(window: Sequence[Record], key: str) -> float:
    """Mean of a key over the records that have it; NaN when none has."""
    values = [r[key] for r in window if r.get(key) is not None and math.isfinite(r[key])]
    return float(np.mean(values)) if values else math.nan


def _nonfinite(record: Record) -> str:
    bad = _bad_keys(record)
    if not bad:
        return ""
    if any(k.startswith("reward/") for k in bad):
        cause = "the reward itself is not finite: look at the reward function and the judge's scores"
    elif any(k.startswith(("kl/", "entropy/")) for k in bad):
        cause = "log-probabilities overflowed: use a smaller learning rate, or float32 compute"
    else:
        cause = "the loss or gradient overflowed: use a smaller learning rate or gradient-norm limit"
    return f"{', '.join(bad)} not finite; {cause}"


def _streak(records: Sequence[Record], i: int, config: HealthConfig) -> str:
    recent = records[max(0, i + 1 - config.nonfinite_patience) : i + 1]
    if len(recent) < config.nonfinite_patience or not all(_bad_keys(r) for r in recent):
        return ""
    said = f"{len(recent)} steps in a row were not finite, the run cannot recover; "
    if all(any(k.startswith("reward/") for k in _bad_keys(r)) for r in recent):
        return said + "the reward itself is not: mend the reward function or the judge's scores"
    return said + "go back to a checkpoint before them with a smaller learning rate"


def _kl(window: Sequence[Record], config: HealthConfig) -> str:
    kl = _mean(window, "kl/ref")
    if not kl > config.kl_limit:
        return ""
    return (
        f"KL to the reference is {kl:.2f} nats per token (limit {config.kl_limit:g}): the policy runs away; "
        "use a smaller learning rate or a larger KL coefficient"
    )


def _entropy(first: Sequence[Record], window: Sequence[Record], config: HealthConfig) -> str:
    now, start = _mean(window, "entropy/mean"), _mean(first, "entropy/mean")
    if not (now < config.entropy_floor and now < config.entropy_fraction * start):
        return ""
    return (
        f"entropy fell from {start:.3f} to {now:.3f} nats per token: the policy repeats itself and no longer "
        "explores; use an entropy bonus, a larger KL coefficient or a smaller learning rate"
    )


def _format(best: float, window: Sequence[Record], config: HealthConfig) -> str:
    now = _mean(window, "reward/format")
    if not (best >= config.format_healthy and now < config.format_floor):
        return ""
    if _mean(window, "length/truncated") > 0.5:
        cause = "most completions meet the token budget and lose their end: raise it or shorten the chains"
    elif _mean(window, "kl/ref") > config.kl_limit:
        cause = "the policy left the reference: use a smaller learning rate or a larger KL coefficient"
    else:
        cause = "the reward does not hold the format: check its format term and the prompt's instruction"
    return f"format rate fell from {best:.0%} to {now:.0%}; {cause}"


def _judge(window: Sequence[Record], config: HealthConfig) -> str:
    missing = _mean(window, "judge/missing")
    if not missing > config.missing_limit:
        return ""
    return f"{missing:.0%} of the samples have no verdict: the judge is down or its answers cannot be read"


def _flat(window: Sequence[Record], config: HealthConfig) -> str:
    flat = _mean(window, "group/zero_variance")
    if len(window) < config.window or not flat > config.flat_limit:
        return ""
    return f"{flat:.0%} of the groups have equal rewards: nothing is learned; sample hotter or harder prompts"


def _gap(first: Sequence[Record], window: Sequence[Record], config: HealthConfig) -> str:
    now, start = _mean(window, "sampler/gap"), _mean(first, "sampler/gap")
    climbs = now > max(config.gap_growth * start, _ROUNDING)
    if not (now > config.gap_limit or climbs):
        return ""
    if _mean(window, "engine/pushes") > 0 or _mean(window, "engine/requests") > 0:
        cause = "a server does not follow the weights, or computes otherwise: start it from RUN/engine, with "
        cause += "--logprobs-mode processed_logprobs, or set algorithm.is_cap"
    else:
        cause = "the sampler is not the policy: with align.overlap use a smaller learning rate or "
        cause += "algorithm.is_cap"
    return f"sampler/gap went from {start:.2g} to {now:.2g} nats per token: {cause}"


def _sft(first: Record, record: Record, config: HealthConfig) -> str:
    start, now = (r.get("loss/sft") for r in (first, record))
    if start is None or now is None or not now > max(config.sft_growth * start, start + _LOSS_NOISE):
        return ""
    return (
        f"the loss rose from {start:.2f} to {now:.2f} nats per token: the model loses what it knew; use "
        "a smaller config.sft_optimizer.lr (1e-5 for a pretrained model, 1e-3 from scratch), or warmup"
    )


def _hacking(first: Sequence[Record], window: Sequence[Record], config: HealthConfig) -> str:
    rise = _mean(window, "reward/welfare") - _mean(first, "reward/welfare")
    now, start = _mean(window, "fluency/mean"), _mean(first, "fluency/mean")
    if not (rise > 0 and start - now > config.fluency_fall):
        return ""
    return (
        f"W rose by {rise:.2f} while fluency fell from {start:.2f} to {now:.2f} nats per token under the "
        "reference: reward hacking; read the rollouts, use a judge that is harder to fool, a larger KL "
        "coefficient or algorithm.fluency_floor"
    )
