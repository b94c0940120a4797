"""What of a run's config may change while it goes on.

free     no number of the run follows from it: where it saves and logs, how long it waits for whom
later    holds from the next step on, and the steps behind stay as they are

Everything else made the steps behind, or has its shape in their checkpoints: with it changed they would be
another run's.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gtalign_jax.run import checkpoint, checksums
from gtalign_jax.run.states import PHASES

_FREE_SECTIONS = ("checkpoint", "metrics", "health", "steer", "synthesis")
_WAITING = ("timeout_s", "call_timeout_s", "tries", "wait_s", "max_wait_s", "api_key_env", "endpoints")
_FREE = frozenset(
    [
        *("align.dump_every", "start.warm_up", "features.workers", "data.workers"),
        *(f"engine.{name}" for name in (*_WAITING, "in_flight", "patience_s", "rest_s")),
        *(f"judge.{name}" for name in (*_WAITING, "concurrency", "skip_after", "skip_s", "cache_dir")),
    ]
)
# Field → the phase whose steps it holds for.
_LATER = {
    "sft.steps": "sft",
    "align.steps": "align",
    "algorithm.kl_coef": "align",
    "algorithm.entropy_coef": "align",
} | {
    f"{optimizer}_optimizer.{name}": phase
    for optimizer, phase in (("sft", "sft"), ("policy", "align"), ("critic", "align"))
    for name in ("lr", "clip_norm")
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A field, such as `align.steps`, and what it was and is."""

    field: str
    old: Any
    new: Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """The fields in which two configs differ, as plain JSON, in order."""
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield Change(f"{prefix}{key}", a, b)


def steps_done(workdir: pathlib.Path) -> dict[str, int]:
    """Phase → the steps behind the run, which its newest whole checkpoint holds."""
    done = {}
    for phase in PHASES:
        folder = workdir / "checkpoints" / phase
        whole = (k for k in checkpoint.steps_in(folder)[::-1] if not checksums.damage(folder / str(k)))
        done[phase] = next(whole, 0)
    return done


def refusal(change: Change, recorded: Mapping[str, Any], done: Mapping[str, int]) -> str:
    """Why a field of a run cannot change any more, or "".

    recorded: the run's config so far. done: steps of each phase that are behind it.
    """
    field, section = change.field, change.field.partition(".")[0]
    if field.endswith(".endpoints") and not (change.old and change.new):
        return "another judge or engine made the steps so far"
    if section in _FREE_SECTIONS or field in _FREE:
        return ""
    phase = _LATER.get(field)
    if phase is None:
        return "the steps so far were made with it"
    if phase == "sft" and done["align"]:
        return "alignment has begun from the end of the cold start"
    if field == "algorithm.kl_coef" and recorded["algorithm"].get("kl_target"):
        return "its controller goes on from what the checkpoint holds"
    if field.endswith(".steps"):
        if change.new < done[phase]:
            return f"{done[phase]} steps are done"
        if recorded["align"].get("overlap") and phase == "align" and done[phase] == change.old > 0:
            return "the last step of a run with align.overlap writes nothing ahead for another"
    return ""
