"""People's ratings of answers beside what the answers were worth: a sheet to fill in, and what came back."""

import csv
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.evaluation.bootstrap import Estimate, bootstrap_means
from gtalign_jax.evaluation.paper.entries import Entry
from gtalign_jax.evaluation.paper.tables import HELD, NOT_HELD, UNDECIDED, Line, Runs, Table
from gtalign_jax.files import clients

COLUMNS = ("item", "method", "rating")
SHOWN_FAULTS = 5


class Rating(NamedTuple):
    """What one person made of a method's answer to an item; higher is better, on any scale."""

    item: str
    method: str
    rating: float


def first_answers(runs: Runs) -> dict[tuple[str, str], Line]:
    """(item, method) → the first answer of its first run. An item is the id of its record, or else its place
    among the prompts."""
    found: dict[tuple[str, str], Line] = {}
    for method, seeds in runs.items():
        places: dict[str, int] = {}
        for line in seeds[0]:
            place = places.setdefault(line["input"], len(places))
            found.setdefault((line.get("id") or str(place), method), line)
    return found


def write_sheet(runs: Runs, path: pathlib.Path) -> None:
    """The answers that are to be rated, as CSV: item, method, rating (empty), question, answer."""
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow((*COLUMNS, "question", "answer"))
    for (item, method), line in sorted(first_answers(runs).items()):
        sheet.writerow((item, method, "", line["input"], line["output"]))
    jsonl.write_atomic(path, text.getvalue())


def read_ratings(path: pathlib.Path, known: Mapping[tuple[str, str], Line]) -> list[Rating]:
    """The ratings of a CSV file with COLUMNS, others beside them are not read; a row without a rating is one
    that nobody filled in. UserError names rows that are wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ratings={path}: cannot be read ({clients.said(error)})") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
        raise UserError(f"--ratings={path}: no column {missing[0]!r}; it takes {', '.join(COLUMNS)}")
    found, faults = [], []
    for row in rows:
        if not (row["rating"] or "").strip():
            continue
        if fault := _fault(row, known):
            faults.append(f"line {rows.line_num}: {fault}")
            continue
        found.append(Rating(row["item"], row["method"], float(row["rating"])))
    if faults:
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise UserError(f"--ratings={path}: {'; '.join(faults[:SHOWN_FAULTS])}{more}; mend or remove them")
    if not found:
        raise UserError(f"--ratings={path}: no row has a rating; fill in that column")
    return found


def _fault(row: Mapping[str, str], known: Mapping[tuple[str, str], Line]) -> str:
    """What is wrong with a row, or ""."""
    try:
        if not np.isfinite(float(row["rating"])):
            raise ValueError
    except ValueError:
        return f"rating {row['rating']!r} is no number"
    if (row["item"], row["method"]) not in known:
        return f"there is no answer of method {row['method']!r} to item {row['item']!r}"
    return ""


def study_table(entry: Entry, runs: Runs, ratings: Sequence[Rating]) -> Table:
    """A row a method and one for all: how the mean rating of an answer goes with its welfare.

    The claim holds where both correlations over all answers are above 0 with their intervals, which draw
    items again, with all answers and ratings to each.
    """
    known, given = first_answers(runs), _by_answer(ratings)
    rated = {key: mean for key, mean in given.items() if known[key].get("utility") is not None}
    methods = {"all": None, **{name: name for name in runs}}
    rows = {}
    for label, method in methods.items():
        kept = [key for key in rated if method in (None, key[1])]
        if kept:
            points = np.array([[rated[key], known[key]["utility"]] for key in kept])
            rows[label] = dict(zip(entry.metrics, _row(points, [key[0] for key in kept]), strict=True))
    both = [rows["all"][name] for name in ("pearson", "spearman")] if rows else []
    return Table(rows, verdict=_verdict(both))


def _by_answer(ratings: Sequence[Rating]) -> dict[tuple[str, str], float]:
    """(item, method) → the mean over those who rated it."""
    found: dict[tuple[str, str], list[float]] = {}
    for item, method, rating in ratings:
        found.setdefault((item, method), []).append(rating)
    return {key: float(np.mean(values)) for key, values in found.items()}


def _verdict(both: Sequence[Estimate]) -> str:
    if not both:
        return ""
    if any(e["hi"] < 0 for e in both):
        return NOT_HELD
    return HELD if all(e["lo"] > 0 for e in both) else UNDECIDED


def _row(points: np.ndarray, items: Sequence[str]) -> list[Estimate]:
    """Pearson's and Spearman's correlation of points [n, 2], and the mean of each column."""
    drawn = np.array([_correlations(each) for each in _drawn(points, items)])
    both = []
    for whole, each in zip(_correlations(points), drawn.T, strict=True):
        some = each[~np.isnan(each)]
        lo, hi = np.percentile(some, [2.5, 97.5]) if len(some) else (np.nan, np.nan)
        counts = {"n": len(points), "clusters": len(set(items))}
        both.append({"mean": whole, "lo": float(lo), "hi": float(hi), **counts})
    return [*both, *bootstrap_means(points, clusters=items)]


def _drawn(points: np.ndarray, items: Sequence[str], n_boot: int = 2000) -> Iterator[np.ndarray]:
    """Points of items that are drawn again with replacement."""
    names, label = np.unique(np.array(items), return_inverse=True)
    rows = [np.flatnonzero(label == i) for i in range(len(names))]
    rng = np.random.default_rng(0)
    for _ in range(n_boot):
        yield points[np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])]


def _correlations(points: np.ndarray) -> tuple[float, float]:
    """(Pearson, Spearman) of two columns; NaN where one of them is constant."""
    if (np.ptp(points, axis=0) == 0).any():
        return float("nan"), float("nan")
    ranks = stats.rankdata(points, axis=0)
    return float(np.corrcoef(points.T)[0, 1]), float(np.corrcoef(ranks.T)[0, 1])
