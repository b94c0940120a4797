"""The paper's tables: the registry, each kind of table on answers made by hand, what becomes of a claim."""

import itertools

import numpy as np
import pytest

from configs import base
from gtalign_jax.chain.parse import parse_chain
from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.evaluation import outcomes
from gtalign_jax.evaluation.paired import Difference
from gtalign_jax.evaluation.paper import figures, games, tables
from gtalign_jax.evaluation.paper.entries import ENTRIES, Entry, Method

TASKS = {"ambig_qa": "ambiguous", "wildguard": "harmful"}


def answers(level, seeds=2, prompts=24, user=0.5, llm=0.5):
    """Lines whose welfare is `level` and a little noise that is the prompt's own."""
    rng, found = np.random.default_rng(0), []
    noise = rng.normal(size=prompts) * 0.05
    matrix = np.array([[[1.0, 1], [0, 2], [0.5, 3.5]], [[3.5, 0], [2, 1], [3, 3]]])
    output = format_chain("t", matrix, "AQ", "r")
    for _ in range(seeds):
        found.append(
            [
                {
                    "input": f"{source} {i}",
                    "output": output,
                    "source": source,
                    "gts": truth,
                    "action": "AQ",
                    "utility": level + noise[i],
                    "user_reward": user + noise[i],
                    "llm_reward": llm - noise[i],
                    "answer_reward": 1.0,
                    "format_reward": 1.0,
                    "n_tokens": 50,
                    "judge": {"verdict": 0.5},
                }
                for source, truth in TASKS.items()
                for i in range(prompts)
            ]
        )
    return found


def named(entry, levels, **points):
    """Runs of an entry's methods; ours has the first level, every other the second."""
    ours, rest = levels
    return {m.name: answers(ours if m.name == entry.ours else rest, **points) for m in entry.methods}


def test_every_change_of_a_method_is_a_field_and_a_name_means_one_model():
    config, seen = base.get_config(), {}
    for entry, method in itertools.chain.from_iterable(
        itertools.product([entry], entry.methods) for entry in ENTRIES.values()
    ):
        for path, _ in (*method.asked, *method.cold, *method.change):
            section, _, field = path.partition(".")
            assert field in config[section], f"{entry.name}: {path}"
        assert seen.setdefault(method.name, method) == method
    assert {entry.kind for entry in ENTRIES.values()} == {*tables.KINDS, "games", "user_study"}


def test_an_entry_names_methods_that_it_has():
    with pytest.raises(ValueError, match="rivals"):
        Entry("x", "y", methods=(Method("cobb_douglas"),), rivals=("nobody",))


@pytest.mark.parametrize(
    "name",
    [name for name, entry in ENTRIES.items() if entry.kind in tables.KINDS and entry.kind != "steering"],
)
def test_every_table_is_made_and_drawn(name, tmp_path):
    entry = ENTRIES[name]
    table = tables.make_table(entry, named(entry, (0.6, 0.5)))
    assert table.rows
    text = tables.format_table(entry, table)
    assert entry.claim in text
    assert all(f"| {label} |" in text for label in table.rows)
    figures.save_table(entry, table, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [((0.6, 0.5), tables.HELD), ((0.5, 0.6), tables.NOT_HELD), ((0.5, 0.5), tables.UNDECIDED)],
)
def test_a_claim_holds_fails_or_stays_open(levels, verdict):
    entry = ENTRIES["baselines"]
    assert tables.make_table(entry, named(entry, levels)).verdict == verdict


def test_a_claim_of_every_task_fails_with_one_of_them():
    entry = ENTRIES["reward_ablation"]
    runs = named(entry, (0.6, 0.5))
    for run in runs["linear"]:
        for line in run:
            line["utility"] += 0.4 * (line["source"] == "wildguard")
    table = tables.make_table(entry, runs)
    assert table.verdict == tables.NOT_HELD
    assert table.differences["wildguard: linear"].mean == pytest.approx(-0.3)
    assert table.differences["ambig_qa: linear"].mean == pytest.approx(0.1)
    assert len(table.differences) == 6


def test_several_differences_are_adjusted_together():
    one = Difference(0.1, 0.01, 0.2, 0.03, 1, 30)
    assert tables.verdict_of({"a": one}) == tables.HELD
    adjusted = tables._adjusted({"a": one, "b": one})
    assert [d.p for d in adjusted.values()] == [0.06, 0.06]
    assert tables.verdict_of(adjusted) == tables.UNDECIDED
    assert tables.verdict_of({}) == ""


def test_points_are_measured_from_the_frontier_that_all_reach_together():
    entry = ENTRIES["pareto"]
    runs = named(entry, (0.5, 0.5), user=0.3, llm=0.3) | {entry.ours: answers(0.5, user=0.6, llm=0.6)}
    table = tables.make_table(entry, runs)
    ours, linear = table.rows[entry.ours], table.rows["linear"]
    assert ours["coverage"]["mean"] > 0.9 > linear["coverage"]["mean"] == 0.0
    assert linear["regret"]["mean"] == pytest.approx(0.3, abs=0.05)
    assert ours["hypervolume"]["mean"] > linear["hypervolume"]["mean"]
    assert table.verdict == tables.HELD


def test_rules_choose_what_the_game_says():
    entry = ENTRIES["choice_rule"]
    rows = tables.make_table(entry, {entry.ours: answers(0.5)}).rows
    frontier, nash = rows["frontier, welfare"], rows["Nash, the best pure one"]
    assert (frontier["llm"]["mean"], frontier["user"]["mean"], frontier["followed"]["mean"]) == (
        3.0,
        3.0,
        1.0,
    )
    assert (nash["llm"]["mean"], nash["user"]["mean"], nash["followed"]["mean"]) == (1.0, 1.0, 0.0)


def test_steering_is_the_dearest_price_against_the_first():
    entry = ENTRIES["steering"]

    def lines(price, tokens):
        shared = {
            "at": price,
            "price": price,
            "failure": None,
            "action": "DA",
            "follows": True,
            "obeys": True,
        }
        numbers = {"welfare": 2.0, "cost": price}
        return [{**shared, **numbers, "id": i, "input": f"q{i}", "n_tokens": tokens + i} for i in range(24)]

    cheap, dear = lines(0.0, 90), lines(8.0, 80)
    unsteered = {"at": 0.0, "failure": "no matrix", "id": 99, "input": "q99", "n_tokens": 500}
    runs = {"price 0": [[*cheap, unsteered]], "price 8": [[*dear, {**unsteered, "at": 8.0}]]}
    table = tables.make_table(entry, runs)
    assert table.rows["price 0"]["steered"]["mean"] == pytest.approx(24 / 25)
    assert table.differences["price 0"].mean == -10.0
    assert table.differences["price 0"].prompts == 24
    assert table.verdict == tables.HELD
    assert "price 8 - … in n_tokens" in tables.format_table(entry, table)


def test_where_less_is_better_a_longer_answer_does_not_hold():
    entry = ENTRIES["length"]
    runs = named(entry, (0.5, 0.5))
    assert tables.make_table(entry, runs).verdict == tables.UNDECIDED
    for run in runs["sft"]:
        for i, line in enumerate(run):
            line["n_tokens"] += 5 + i % 2
    assert tables.make_table(entry, runs).verdict == tables.HELD
    for run in runs[entry.ours]:
        for line in run:
            line["n_tokens"] += 20
    assert tables.make_table(entry, runs).verdict == tables.NOT_HELD


@pytest.mark.parametrize("name", ["efficiency", "reward_ablation"])
def test_a_chain_is_parsed_once_for_rows_and_differences(name, monkeypatch):
    entry, seen = ENTRIES[name], []
    monkeypatch.setattr(outcomes, "parse_chain", lambda text: seen.append(text) or parse_chain(text))
    runs = named(entry, (0.6, 0.5))
    tables.make_table(entry, runs)
    assert len(seen) == sum(len(run) for seeds in runs.values() for run in seeds)


def test_games_are_watched_by_what_they_should_come_to():
    solutions = {one.name: one.solution for one in games.studied()}
    assert solutions["dilemma: first defects"] == 1.0
    assert solutions["bargaining: first keeps"] == pytest.approx(0.3)
    curves = {name: np.full((3, 40), value) for name, value in solutions.items()}
    curves["signalling: able buy it"] = np.tile([0.0, 1.0], (3, 20))
    rows = games.games_table(curves).rows
    assert rows["bargaining: first keeps"]["reached"]["mean"] == 1.0
    restless = rows["signalling: able buy it"]
    assert (restless["reached"]["mean"], restless["moves"]["mean"]) == (0.0, 0.5)


def test_methods_that_were_asked_fewer_prompts_are_named():
    asked = {name: [[{"input": f"q{i}"} for i in range(n)]] for name, n in (("plain", 2), ("ours", 5))}
    assert tables.unasked(asked) == "Of 5 prompts some methods were asked fewer: plain 2."
    assert tables.unasked({"ours": asked["ours"], "other": asked["ours"]}) == "" == tables.unasked({})
