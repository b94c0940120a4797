"""Normalise recorded scores: python -m experiments.normalize IN.jsonl OUT.jsonl --method=zscore [--reference]

A line is one batch: {"id", "sources": [...], "scores": [...]}. Each output line is the input line and
`normalized`. A score may be null (no verdict; it takes no part and stays null) or "nan", "inf", "-inf".
--reference gives what the published code computes; there every score must be a number, and a result that
is not finite is written as such a string.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.published import normalize as published
from gtalign_jax.files import drafts
from gtalign_jax.rewards.normalize import METHODS, normalize_scores
from gtalign_jax.run import progress

NOT_FINITE = ("nan", "inf", "-inf")
# (float64 scores with NaN for null, sources) → normalised scores as they are written.
Normalizer = Callable[[list[float], list[str]], list[float | str | None]]


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("input", metavar="IN.jsonl", help="JSON lines to read, one batch each")
    parser.add_argument("output", metavar="OUT.jsonl", help="JSON lines to write")
    parser.add_argument("--method", default="zscore", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--reference", action="store_true", help="as the published code computes it")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    known = published.METHODS if flags.reference else METHODS
    if flags.method not in known:
        raise UserError(f"--method={flags.method}: use one of {', '.join(known)}")
    normalizer = functools.partial(reference if flags.reference else corrected, method=flags.method)
    lines = normalized_lines(flags.input, normalizer, nulls=not flags.reference)
    drafts.check(flags.output, "OUT.jsonl", flags.input)
    with jsonl.draft(flags.output) as sink:
        for batch in progress.counted(progress.batches(lines, 1), "normalize"):
            for line in batch:
                sink.write(jsonl.encode(line) + "\n")


def normalized_lines(path: str, normalizer: Normalizer, nulls: bool) -> Iterator[dict[str, Any]]:
    """The lines of a file with `normalized` added. UserError names the line and field that is wrong."""
    for number, line in jsonl.stream(path):
        scores, sources = read_line(line, f"{path}:{number}", nulls)
        yield {**line, "normalized": normalizer(scores, sources)}


def read_line(line: Mapping[str, Any], where: str, nulls: bool) -> tuple[list[float], list[str]]:
    """(scores, sources) of a line, null as NaN where nulls are allowed."""
    scores, sources = line.get("scores"), line.get("sources")
    if not isinstance(scores, list):
        raise UserError(f"{where}: scores must be a list of numbers")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UserError(f"{where}: sources must be a list of strings, one a score")
    if len(scores) != len(sources):
        raise UserError(
            f"{where}: sources holds {len(sources)} names for {len(scores)} scores; give one each"
        )
    return [_number(score, f"{where}: scores[{i}]", nulls) for i, score in enumerate(scores)], sources


def _number(score: Any, where: str, nulls: bool) -> float:
    if score is None and nulls:
        return math.nan
    if isinstance(score, str) and score in NOT_FINITE:
        return float(score)
    if isinstance(score, bool) or not isinstance(score, int | float):
        null = ", null" if nulls else ""
        raise UserError(
            f"{where}={str(score)[:20]!r}: must be a number{null} or one of {', '.join(NOT_FINITE)}"
        )
    try:
        return float(score)
    except OverflowError as error:
        raise UserError(f"{where}: too large for a float; write a smaller number") from error


def reference(scores: list[float], sources: list[str], method: str) -> list[float | str | None]:
    """The published normalisation on host float64."""
    return [x if math.isfinite(x) else str(x) for x in published.normalize(scores, sources, method).tolist()]


def corrected(scores: list[float], sources: list[str], method: str) -> list[float | str | None]:
    """Our jitted normalisation in float64; scores that are not finite take no part and become null.

    Lengths and source counts are padded to powers of two, so a file compiles few programs.
    """
    if not scores:
        return []
    names = list(dict.fromkeys(sources))
    padded = 1 << (len(scores) - 1).bit_length()
    values, source, valid = np.zeros(padded), np.zeros(padded, np.int32), np.zeros(padded, bool)
    values[: len(scores)] = scores
    source[: len(scores)] = [names.index(name) for name in sources]
    valid[: len(scores)] = np.isfinite(values[: len(scores)])
    values[~valid] = 0.0
    with jax.enable_x64(True):
        program = _program(method, 1 << (len(names) - 1).bit_length())
        out = np.asarray(program(values, source, valid))[: len(scores)]
    return [x if ok else None for x, ok in zip(out.tolist(), valid.tolist(), strict=False)]


@functools.cache
def _program(method: str, num_sources: int) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(normalize_scores, method=method, num_sources=num_sources))


if __name__ == "__main__":
    main()
