"""What became of the candidates: kept, made again, given up, task by task, and what it took."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping

from gtalign_jax.synthesis.store import Fields

OVERALL = "overall"


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of a task's records, which add up.

    counts: prompts, kept, unjudged (kept without a verdict), candidates, standing (those not given up),
    tokens_in, tokens_out. kept, standing: summed welfare of such candidates. actions: of the kept ones.
    rejected, again: reasons for which candidates were given up, and components made again.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    kept: float = 0.0
    standing: float = 0.0
    actions: Counter[str] = dataclasses.field(default_factory=Counter)
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    again: Counter[str] = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Tally") -> "Tally":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Tally(*(a + b for a, b in pairs))


Tallies = Mapping[str, Tally]
"""Task → what became of its records."""


def tally(before: Tallies, records: Iterable[Fields]) -> dict[str, Tally]:
    """The tallies with these records too. One by one, so that the sums do not depend on the batches."""
    found = dict(before)
    for record in records:
        found[record["task"]] = found.get(record["task"], Tally()) + _of(record)
    return found


def overall(tallies: Tallies) -> Tally:
    """All tasks as one."""
    return functools.reduce(lambda a, b: a + b, tallies.values(), Tally())


def cost(tokens_in: int, tokens_out: int, prices: tuple[float, float]) -> float:
    """What tokens cost at prices of a million read and written."""
    return (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6


def report_of(tallies: Tallies, repeated: int, prices: tuple[float, float]) -> Fields:
    """`report.json`. repeated: prompts of the data that stood before, and have no record of their own."""
    rows = {**tallies, OVERALL: overall(tallies)}
    return {
        "repeated_prompts": repeated,
        "tasks": {name: _numbers(row, prices) for name, row in rows.items()},
    }


def _of(record: Fields) -> Tally:
    told = record["candidates"]
    standing = [each for each in told if "welfare" in each]
    chosen = told[record["kept"]] if "chain" in record else None
    counts = {
        "prompts": 1,
        "kept": int(chosen is not None),
        "candidates": len(told),
        "standing": len(standing),
        "unjudged": int(chosen is not None and chosen["verdict"] is None),
        "tokens_in": record["tokens"]["in"],
        "tokens_out": record["tokens"]["out"],
    }
    return Tally(
        Counter(counts),
        (chosen or {}).get("welfare") or 0.0,
        sum(each["welfare"] or 0.0 for each in standing),
        Counter([chosen["action"]] if chosen else []),
        Counter(_kind(each["rejected"]) for each in told if "rejected" in each),
        Counter(_kind(why) for each in told for why in each.get("failures", ())),
    )


def _kind(reason: str) -> str:
    """A reason without its details."""
    return reason.partition(" (")[0]


def _numbers(row: Tally, prices: tuple[float, float]) -> Fields:
    n = row.counts
    return {
        "prompts": n["prompts"],
        "kept": n["kept"],
        "without_verdict": n["unjudged"],
        "candidates": n["candidates"],
        "welfare_kept": row.kept / n["kept"] if n["kept"] else None,
        "welfare_mean": row.standing / n["standing"] if n["standing"] else None,
        "actions": dict(row.actions.most_common()),
        "rejected": dict(row.rejected.most_common()),
        "made_again": dict(row.again.most_common()),
        "tokens_in": n["tokens_in"],
        "tokens_out": n["tokens_out"],
        "cost": cost(n["tokens_in"], n["tokens_out"], prices),
    }


def text_report(report: Fields) -> str:
    """The report as lines."""
    lines = [f"{'task':14}{'prompts':>8}{'kept':>7}{'W kept':>8}{'W mean':>8}  actions"]
    for name, row in report["tasks"].items():
        welfare = "".join(
            f"{'-' if row[k] is None else format(row[k], '.3f'):>8}" for k in ("welfare_kept", "welfare_mean")
        )
        lines.append(f"{name:14}{row['prompts']:>8}{row['kept']:>7}{welfare}  {_counts(row['actions'])}")
    for name, row in report["tasks"].items():
        for field, said in (("rejected", "candidates given up"), ("made_again", "components not taken")):
            if row[field]:
                lines.append(f"{name}: {said}: {_counts(row[field])}")
        if row["without_verdict"]:
            lines.append(f"{name}: {row['without_verdict']} chains kept without a verdict")
    whole = report["tasks"][OVERALL]
    if whole["tokens_in"] or whole["tokens_out"]:
        spent = f", cost {whole['cost']:,.2f}" if whole["cost"] else ""
        lines.append(f"tokens: {whole['tokens_in']:,} read, {whole['tokens_out']:,} written{spent}")
    if report["repeated_prompts"]:
        lines.append(f"{report['repeated_prompts']} prompts stood twice in the data and have one chain")
    return "\n".join(lines)


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items())
