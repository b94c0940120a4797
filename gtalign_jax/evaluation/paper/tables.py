"""From the models' held-out answers to a table, and from the table to whether the claim holds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.chain.parse import parse_chain, payoff_array
from gtalign_jax.evaluation.areas import percentile_estimate, resampled_areas
from gtalign_jax.evaluation.bootstrap import Estimate, bootstrap_means, cell, task_of
from gtalign_jax.evaluation.outcomes import measured, outcomes
from gtalign_jax.evaluation.paired import Difference, by_prompt, holm, paired_difference
from gtalign_jax.evaluation.paper.entries import Entry
from gtalign_jax.evaluation.steering import steering_curve
from gtalign_jax.game import equilibrium, pareto
from gtalign_jax.game.moves import ACTIONS, LLM, USER
from gtalign_jax.game.payoff import cell_welfare, welfare_optimal
from gtalign_jax.types import Array

Line = Mapping[str, Any]
Runs = Mapping[str, Sequence[Sequence[Line]]]
"""Of each method, the held-out rollout lines of each seed's run."""

EPS = 0.05  # of coverage, in units of reward, as the paper's
HELD, NOT_HELD, UNDECIDED = "held", "did not hold", "undecided"


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: {label: {metric: estimate}}. differences: ours - rival in the claim's metric, where there are
    rivals, with Holm's p. verdict: HELD, NOT_HELD, UNDECIDED, or "" where only numbers are claimed. note: why
    there are no rows, where that is known."""

    rows: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference] = dataclasses.field(default_factory=dict)
    verdict: str = ""
    note: str = ""


def make_table(entry: Entry, runs: Runs) -> Table:
    """The table of an entry from the answers of its methods."""
    return KINDS[entry.kind](entry, runs)


def verdict_of(differences: Mapping[str, Difference], less: bool = False, level: float = 0.05) -> str:
    """HELD where ours is better than every rival, NOT_HELD where it is worse than one; else UNDECIDED.

    A difference counts where its p-value, adjusted, is below the level. less: better is less.
    """
    if not differences:
        return ""
    sure = [-d.mean if less else d.mean for d in differences.values() if d.p < level]
    if any(mean < 0 for mean in sure):
        return NOT_HELD
    return HELD if len(sure) == len(differences) else UNDECIDED


def _differences(entry: Entry, runs: Runs) -> dict[str, Difference]:
    """Ours against each rival in the entry's metric."""
    ours = runs[entry.ours]
    return _adjusted({rival: paired_difference(ours, runs[rival], entry.metric) for rival in entry.rivals})


def _adjusted(found: Mapping[str, Difference]) -> dict[str, Difference]:
    """The differences with their p-values adjusted for their number."""
    adjusted = holm([d.p for d in found.values()])
    return {name: d._replace(p=p) for (name, d), p in zip(found.items(), adjusted, strict=True)}


def _measured(runs: Runs) -> Runs:
    """Runs whose lines hold their measures."""
    return {method: [[measured(line) for line in run] for run in seeds] for method, seeds in runs.items()}


def _compare(entry: Entry, runs: Runs) -> Table:
    """A row a method, all tasks and seeds together."""
    runs, rows = _measured(runs), {}
    for method, seeds in runs.items():
        found = outcomes([line for run in seeds for line in run])
        rows[method] = {name: found[name] for name in entry.metrics if name in found}
    differences = _differences(entry, runs)
    return Table(rows, differences, verdict_of(differences, entry.less))


def _by_task(entry: Entry, runs: Runs) -> Table:
    """A row a method and task, in the entry's metric; the claim is about each task's, so all must hold."""
    runs = _measured(runs)
    tasks = sorted({task_of(line) for seeds in runs.values() for run in seeds for line in run})
    rows: dict[str, dict[str, Estimate]] = {method: {} for method in runs}
    found: dict[str, Difference] = {}
    for task in tasks:
        part = {m: [[x for x in run if task_of(x) == task] for run in seeds] for m, seeds in runs.items()}
        for method, seeds in part.items():
            if (mean := _mean(seeds, entry.metric))["n"]:
                rows[method][task] = mean
        for rival in entry.rivals:
            found[f"{task}: {rival}"] = paired_difference(part[entry.ours], part[rival], entry.metric)
    differences = _adjusted(found)
    return Table(rows, differences, verdict_of(differences, entry.less))


def _mean(seeds: Sequence[Sequence[Line]], metric: str) -> Estimate:
    """The mean over all lines of a method that have the metric."""
    flat = [line for run in seeds for line in run]
    values = np.array([[math.nan if line.get(metric) is None else line[metric]] for line in flat])
    return bootstrap_means(values, clusters=[line["input"] for line in flat])[0]


def _on_frontier(runs: Runs) -> tuple[Runs, dict[str, np.ndarray]]:
    """Per prompt and seed one line with `coverage` and `regret` to the frontier that all methods reach
    together; and each method's points [prompts, 2], means over seeds."""
    per_run = {
        method: [(by_prompt([run], "user_reward")[0], by_prompt([run], "llm_reward")[0]) for run in seeds]
        for method, seeds in runs.items()
    }
    prompts = sorted(set.intersection(*(set(u) & set(v) for seeds in per_run.values() for u, v in seeds)))
    points = {
        method: [np.array([[u[p], v[p]] for p in prompts]) for u, v in seeds]
        for method, seeds in per_run.items()
    }
    front = pareto.frontier_points(np.concatenate([x for seeds in points.values() for x in seeds]))

    def lines(at: np.ndarray) -> list[Line]:
        near, far = pareto.within(at, front, EPS), pareto.regret(at, front)
        values = zip(prompts, near, far, strict=True)
        return [{"input": p, "coverage": float(c), "regret": float(r)} for p, c, r in values]

    means = {method: np.mean(seeds, axis=0) for method, seeds in points.items()}
    return {method: [lines(at) for at in seeds] for method, seeds in points.items()}, means


def _pareto(entry: Entry, runs: Runs) -> Table:
    """Coverage, regret and hypervolume of each method's (U, L) points, one a prompt."""
    lines, points = _on_frontier(runs)
    wholes, drawn = resampled_areas(list(points.values()), (0.0, 0.0), 2000, 0)
    rows = {}
    for (method, seeds), whole, areas in zip(lines.items(), wholes, drawn, strict=True):
        flat = [line for run in seeds for line in run]
        values = np.array([[line["coverage"], line["regret"]] for line in flat])
        near, far = bootstrap_means(values, clusters=[line["input"] for line in flat])
        area = percentile_estimate(whole, areas, len(points[method]))
        rows[method] = {"coverage": near, "regret": far, "hypervolume": area}
    differences = _differences(entry, lines)
    return Table(rows, differences, verdict_of(differences, entry.less))


def _weights(entry: Entry, runs: Runs) -> Table:
    """`_pareto` and welfare; the claim is of a range, not of a winner, so there is no verdict."""
    table = _pareto(entry, runs)
    rows = {}
    for method, seeds in runs.items():
        rows[method] = {"coverage": table.rows[method]["coverage"], "utility": _mean(seeds, "utility")}
    return Table(rows)


@jax.jit
def _rules(payoff: Array) -> dict[str, tuple[Array, Array]]:
    """(user move, action) [n] of each choice rule for matrices [n, U, A, 2]."""
    nash = equilibrium.pure_nash(payoff)
    best = jnp.where(nash, cell_welfare(payoff), -jnp.inf).reshape(len(payoff), -1)
    first = jnp.argmax(best, axis=-1)
    return {
        "frontier, welfare": welfare_optimal(payoff),
        "Nash, the best pure one": (first // payoff.shape[2], first % payoff.shape[2]),
        "Stackelberg": equilibrium.stackelberg(payoff),
    }


def _choice_rule(entry: Entry, runs: Runs) -> Table:
    """What each rule would choose in the matrices that the model wrote: its cell's welfare above the floor
    and payoffs, and how often the model's own action was that one. A matrix without a pure equilibrium has
    no Nash cell."""
    lines = [line for run in runs[entry.ours] for line in run]
    read = [payoff_array(parse_chain(line["output"])) for line in lines]
    kept = [(line, payoff) for line, (payoff, ok) in zip(lines, read, strict=True) if ok]
    if not kept:
        return Table({})
    payoff = np.stack([payoff for _, payoff in kept])
    prompts = [line["input"] for line, _ in kept]
    said = np.array([ACTIONS.index(line["action"]) if line["action"] else -1 for line, _ in kept])
    welfare, none = np.asarray(cell_welfare(payoff)), ~np.asarray(equilibrium.pure_nash(payoff)).any((1, 2))
    rows = {}
    for rule, (move, action) in jax.device_get(_rules(payoff)).items():
        at = (np.arange(len(payoff)), move, action)
        values = np.stack([welfare[at], *(payoff[at][:, p] for p in (LLM, USER)), action == said], axis=1)
        values[none & rule.startswith("Nash")] = np.nan
        rows[rule] = dict(zip(entry.metrics, bootstrap_means(values, clusters=prompts), strict=True))
    return Table(rows)


def _steering(entry: Entry, runs: Runs) -> Table:
    """A row a price, of lines that `serving.sweep` made; the last against the first, prompt by prompt."""
    rows = {}
    for price, (lines,) in runs.items():
        (found,) = steering_curve(lines).values()
        rows[price] = {name: found[name] for name in entry.metrics if found[name]["n"]}
    steered = {p: [[x for x in lines if x.get("failure") is None]] for p, (lines,) in runs.items()}
    first = next(iter(runs))
    differences = {first: paired_difference(steered[entry.ours], steered[first], entry.metric)}
    return Table(rows, differences, verdict_of(differences, entry.less))


KINDS: Mapping[str, Callable[[Entry, Runs], Table]] = {
    "compare": _compare,
    "by_task": _by_task,
    "pareto": _pareto,
    "weights": _weights,
    "choice_rule": _choice_rule,
    "steering": _steering,
}


def unasked(runs: Runs) -> str:
    """A sentence on methods that were asked fewer prompts than others, for want of room; "" without any."""
    asked = {name: {x["input"] for run in seeds for x in run} for name, seeds in runs.items()}
    most = max(map(len, asked.values()), default=0)
    fewer = [f"{name} {len(prompts)}" for name, prompts in asked.items() if len(prompts) < most]
    return f"Of {most} prompts some methods were asked fewer: {', '.join(fewer)}." if fewer else ""


def format_table(entry: Entry, table: Table) -> str:
    """The table as Markdown: rows, differences, and what became of the claim."""
    if not table.rows:
        return f"{table.note or 'No answer holds what this table is made of.'}\n\nClaim: {entry.claim}.\n"
    columns = list(dict.fromkeys(name for row in table.rows.values() for name in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, row in table.rows.items():
        lines.append(f"| {label} | {' | '.join(cell(row.get(name)) for name in columns)} |")
    if table.differences:
        lines += ["", f"| {entry.ours} - … in {entry.metric} | difference | p (Holm) | seeds | prompts |"]
        lines.append("|---|---|---|---|---|")
        for name, d in table.differences.items():
            shown = cell({"mean": d.mean, "lo": d.lo, "hi": d.hi}, "+")
            lines.append(f"| {name} | {shown} | {d.p:.3f} | {d.seeds} | {d.prompts} |")
    claim = f"Claim: {entry.claim}."
    return "\n".join([*lines, "", f"{claim} **{table.verdict}**" if table.verdict else claim, ""])
