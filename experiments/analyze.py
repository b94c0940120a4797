"""Compare two rollout files: python -m experiments.analyze A.jsonl B.jsonl [--eps --alpha --json --reference]

Lines are matched by input within a source. Each matched input is one point (U, L) a file; several lines of
one input are averaged. Intervals are 95 % bootstrap over inputs, the same draws for both files; coverage
and regret keep the joint frontier of the full data, and a resample's area never exceeds the full one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.areas import percentile_estimate, resampled_areas
from gtalign_jax.evaluation.bootstrap import MIN_PROMPTS, OVERALL, Estimate, bootstrap_means
from gtalign_jax.evaluation.published import pareto as published
from gtalign_jax.files import paths
from gtalign_jax.game import pareto

log = logging.getLogger("analyze")

REWARDS = ("user_reward", "llm_reward")
LINE_METRICS = (*REWARDS, "nash", "cobb_douglas")
METRICS = (*LINE_METRICS, "coverage", "regret", "hypervolume")
N_BOOT = 2000

Key = tuple[str, str]  # (source, input)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("a", help="rollout file A (JSON lines with input, source, user_reward, llm_reward)")
    parser.add_argument("b", help="rollout file B")
    parser.add_argument("--eps", type=float, default=0.05, help="tolerance of coverage and dominance")
    parser.add_argument("--alpha", type=float, default=0.5, help="the user's weight in Cobb-Douglas")
    parser.add_argument(
        "--reference_point", type=float, nargs=2, default=(0.0, 0.0), metavar=("U", "L"), help="of the area"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--reference", action="store_true", help="what the published analysis gives")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if not 0.0 <= flags.eps < math.inf:
        raise UserError(f"--eps={flags.eps}: must be a number of at least 0")
    if not 0.0 <= flags.alpha <= 1.0:
        raise UserError(f"--alpha={flags.alpha}: must lie in [0, 1]")
    if flags.seed < 0:
        raise UserError(f"--seed={flags.seed}: must be 0 or positive")
    if not all(map(math.isfinite, flags.reference_point)):
        raise UserError(f"--reference_point={flags.reference_point}: must be two finite numbers")
    rows = read_rows(flags.a), read_rows(flags.b)
    if flags.reference:
        found, table = reference_analysis(*rows, flags), format_reference
    else:
        found, table = analyze(*rows, flags), format_analysis
    print(json.dumps(jsonl.plain(found), ensure_ascii=False, allow_nan=False) if flags.json else table(found))


def read_rows(path: str) -> list[dict[str, Any]]:
    """The lines of a rollout file; UserError when it is absent or empty."""
    if not paths.path(path).is_file():
        raise UserError(f"{path}: no such file; give two rollout files (rollouts/<split>_<step>.jsonl)")
    rows = jsonl.read(path)
    if not rows:
        raise UserError(f"{path}: holds no lines")
    return rows


@dataclasses.dataclass(frozen=True)
class Points:
    """What a file says: the LINE_METRICS of each input, averaged over its lines, and counts of lines."""

    values: dict[Key, np.ndarray]
    counts: dict[str, int]


def collect(rows: Iterable[Mapping[str, Any]], path: str, alpha: float) -> Points:
    """Points of the valid lines. A line is invalid without an input or without two finite rewards."""
    lines: dict[Key, list[np.ndarray]] = {}
    invalid, total = [], 0
    for number, row in enumerate(rows, 1):
        total += 1
        problem = _problem(row)
        if problem:
            invalid.append(f"line {number}: {problem}")
            continue
        point = np.array([[row[name] for name in REWARDS]], np.float64)
        welfares = [pareto.welfare(point, weight) for weight in (0.5, alpha)]
        key = (str(row.get("source", "no source")), row["input"].strip())
        lines.setdefault(key, []).append(np.concatenate([point[0], *welfares]))
    if invalid:
        log.warning("%s: %d of %d lines left out, such as %s", path, len(invalid), total, invalid[0])
    if not lines:
        raise UserError(f"{path}: no line has an input and finite user_reward and llm_reward ({invalid[0]})")
    counts = {"lines": total, "invalid": len(invalid), "inputs": len(lines)}
    counts["repeated"] = total - len(invalid) - len(lines)
    return Points({key: np.mean(found, axis=0) for key, found in lines.items()}, counts)


def _problem(row: Mapping[str, Any]) -> str | None:
    """Why a line cannot be used; a reward of null (no verdict) is missing, not zero."""
    if not isinstance(row.get("input"), str):
        return "input is not text"
    for name in REWARDS:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            return f"{name} is {repr(value)[:40]}"
    return None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def analyze(
    a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]], flags: argparse.Namespace
) -> dict[str, Any]:
    """The comparison, per source and overall: METRICS of both files, their change, and pairs by class."""
    first, second = collect(a, flags.a, flags.alpha), collect(b, flags.b, flags.alpha)
    keys = [key for key in first.values if key in second.values]
    counts: dict[str, Any] = {"a": first.counts, "b": second.counts, "matched": len(keys)}
    for name, points in (("a", first), ("b", second)):
        counts[name]["unmatched"] = len(points.values) - len(keys)
        if counts[name]["unmatched"]:
            log.warning("%s: %d inputs have no partner", getattr(flags, name), counts[name]["unmatched"])
    if not keys:
        raise UserError(f"{flags.a} and {flags.b} share no input: compare rollouts of the same prompts")
    parts = {source: [k for k in keys if k[0] == source] for source in dict.fromkeys(k[0] for k in keys)}
    parts[OVERALL] = keys
    return {
        "a": flags.a,
        "b": flags.b,
        "eps": flags.eps,
        "alpha": flags.alpha,
        "reference_point": list(flags.reference_point),
        "counts": counts,
        "sources": {
            source: compare(
                np.array([first.values[k] for k in part]), np.array([second.values[k] for k in part]), flags
            )
            for source, part in parts.items()
        },
    }


def compare(a: np.ndarray, b: np.ndarray, flags: argparse.Namespace) -> dict[str, Any]:
    """Estimates for matched LINE_METRICS a and b [n, 4]; the share of pairs in each class of dominance."""
    points_a, points_b = a[:, :2], b[:, :2]
    front = pareto.frontier_points(np.concatenate([points_a, points_b]))

    def of_items(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.column_stack(
            [values, pareto.within(points, front, flags.eps), pareto.regret(points, front)]
        )

    sides = of_items(a, points_a), of_items(b, points_b)
    pairs = pareto.compare(points_a, points_b, flags.eps)
    columns = np.column_stack([*sides, sides[1] - sides[0], *pairs.values()])
    found = bootstrap_means(columns, n_boot=N_BOOT, seed=flags.seed)
    k = sides[0].shape[1]
    split = {"a": found[:k], "b": found[k : 2 * k], "change": found[2 * k : 3 * k]}
    for side, area in areas(points_a, points_b, flags).items():
        split[side].append(area)
    return {
        "n": len(a),
        "metrics": {
            name: {side: split[side][i] for side in ("a", "b", "change")} for i, name in enumerate(METRICS)
        },
        "pairs": dict(zip(pareto.COMPARISONS, found[3 * k :], strict=True)),
    }


def areas(a: np.ndarray, b: np.ndarray, flags: argparse.Namespace) -> dict[str, Estimate]:
    """Hypervolume of both sets [n, 2] and its change; the intervals are percentiles over resampled inputs."""
    (whole_a, whole_b), (of_a, of_b) = resampled_areas(
        (a, b), tuple(flags.reference_point), N_BOOT, flags.seed
    )
    drawn = {"a": (whole_a, of_a), "b": (whole_b, of_b), "change": (whole_b - whole_a, of_b - of_a)}
    return {side: percentile_estimate(whole, values, len(a)) for side, (whole, values) in drawn.items()}


def reference_analysis(
    a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]], flags: argparse.Namespace
) -> dict[str, Any]:
    """The published comparison; where the published code raises, a UserError says so."""
    try:
        return published.compare(a, b, flags.eps, flags.alpha)
    except KeyError as error:
        raise UserError(
            f"{flags.a}, {flags.b}: a line lacks {error}; the published analysis stops there"
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{flags.a}, {flags.b}: {error}; the published analysis stops there") from error


def format_analysis(found: Mapping[str, Any]) -> str:
    """The comparison as plain text: a block a source, a line a metric."""
    counts = found["counts"]
    lines = [f"{name.upper()}  {found[name]}  {_counts(counts[name])}" for name in ("a", "b")]
    lines.append(
        f"{counts['matched']} matched inputs; eps={found['eps']:g} alpha={found['alpha']:g} "
        f"area from ({found['reference_point'][0]:g}, {found['reference_point'][1]:g}); "
        "95 % bootstrap intervals; * the change is not 0"
    )
    for source, part in found["sources"].items():
        lines += ["", f"{source} ({part['n']} inputs)", f"{'':<14}{'A':>26}{'B':>26}{'B - A':>28}"]
        for name, sides in part["metrics"].items():
            change = sides["change"]
            enough = part["n"] >= MIN_PROMPTS
            mark = " *" if enough and (change["lo"] > 0 or change["hi"] < 0) else ""
            lines.append(
                f"{name:<14}{_cell(sides['a']):>26}{_cell(sides['b']):>26}{_cell(change, '+'):>28}{mark}"
            )
        shares = ", ".join(f"{name.replace('_', ' ')} {_cell(e)}" for name, e in part["pairs"].items())
        lines.append(f"pairs: {shares}")
        if part["n"] < MIN_PROMPTS:
            lines.append(f"fewer than {MIN_PROMPTS} inputs: too narrow intervals, no change is marked")
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def _cell(e: Estimate, sign: str = "") -> str:
    return f"{e['mean']:{sign}.3f} [{e['lo']:{sign}.3f}, {e['hi']:{sign}.3f}]"


def format_reference(found: Mapping[str, Any]) -> str:
    """The published numbers as plain text, a line a number."""
    lines = ["The published analysis, defects included"]
    for name, value in found.items():
        if not isinstance(value, Mapping):
            lines.append(f"{name:<32}{value:g}")
            continue
        for part, inner in value.items():
            inner = inner if isinstance(inner, Mapping) else {"": inner}
            lines += [f"{' '.join([name, part, last]).strip():<48}{x:.6g}" for last, x in inner.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
