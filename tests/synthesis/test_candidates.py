"""The best of a group is kept whatever the teachers and batches are; what is unfit is made again."""

import json
import threading

import jax.numpy as jnp
import pytest

from gtalign_jax.chain.parse import chosen_action, parse_chain, payoff_array
from gtalign_jax.chain.solver import solver_action
from gtalign_jax.data import sources
from gtalign_jax.data.builders.opened import open_sets
from gtalign_jax.data.config import DataConfig
from gtalign_jax.errors import UserError
from gtalign_jax.rewards.mutual_welfare import REWARDS
from gtalign_jax.rewards.tasks import TASKS
from gtalign_jax.synthesis.ask import ANALYSIS, COMPONENTS
from gtalign_jax.synthesis.job import synthesize
from gtalign_jax.synthesis.store import records
from tests.synthesis.conftest import component_of, small


def served(server, **synthesis):
    """A config whose teachers are all at a server."""
    return small(teacher="server", model="wise", endpoints=(server.url,), wait_s=0.01, **synthesis)


def made(config, workdir):
    """The records and the bytes of what a synthesis writes."""
    workdir.mkdir(exist_ok=True)
    synthesize(config, workdir)
    return list(records(workdir)), (workdir / "train.jsonl").read_bytes()


def check(record):
    """What holds for every record, whoever taught."""
    worth = {i: each["welfare"] for i, each in enumerate(record["candidates"]) if "welfare" in each}
    if not worth:
        assert "chain" not in record
        return
    assert record["welfare"] == worth[record["kept"]] == max(worth.values())
    assert set(record["components"]) == set(COMPONENTS)
    chain = parse_chain(record["chain"])
    payoff, whole = payoff_array(chain)
    assert chain.format_ok and whole and not chain.errors
    assert chosen_action(chain.analyze) == solver_action(payoff)


def test_of_every_group_the_best_is_kept_and_its_analysis_follows_from_its_matrix(server, tmp_path):
    found, data = made(served(server, candidates=9, attempts=2), tmp_path)
    assert len(found) == 6
    for record in found:
        check(record)
        assert len(record["candidates"]) == 9
        assert {origin["model"] for origin in record["components"].values()} == {"wise"}
    told = [each for record in found for each in record["candidates"]]
    assert any("rejected" in each for each in told) and any(
        "failures" in each and "welfare" in each for each in told
    )
    reasons = " ".join(each.get("rejected", "") for each in told)
    assert "analysis contradicts its matrix" in reasons and "matrix cannot be read" in reasons
    report = json.loads((tmp_path / "report.json").read_text())["tasks"]["overall"]
    assert report["candidates"] == 54 and report["tokens_out"] == 4 * len(server.asked)
    assert sum(report["rejected"].values()) == sum("rejected" in each for each in told)
    assert data.count(b"\n") == report["kept"]


def test_the_output_is_the_same_whatever_is_asked_at_a_time_and_in_which_order(server, tmp_path):
    _, one = made(served(server, in_flight=1, at_once=1), tmp_path / "one")
    first, asked = server.asked, sorted(json.dumps(body, sort_keys=True) for body in server.asked)
    server.asked = []
    _, many = made(served(server, in_flight=16, at_once=6), tmp_path / "many")
    assert one == many
    assert asked == sorted(json.dumps(body, sort_keys=True) for body in server.asked)
    assert first


def test_a_prompt_has_the_same_chain_wherever_it_stands(server, tmp_path):
    few, _ = made(served(server), tmp_path / "few")
    config = served(server)
    config.data.train_per_task = 4
    more, _ = made(config, tmp_path / "more")
    assert {r["digest"]: r for r in few}.items() <= {r["digest"]: r for r in more}.items()


def test_the_solver_may_write_the_analysis(server, tmp_path):
    found, _ = made(served(server, analyze="solver"), tmp_path)
    for record in found:
        check(record)
    assert not any(component_of(body["messages"][-1]["content"]) == ANALYSIS for body in server.asked)
    assert all(r["components"]["analysis"]["teacher"] == "solver" for r in found if "chain" in r)


def test_each_component_is_conditioned_on_those_before(server, tmp_path):
    made(served(server), tmp_path)
    for body in server.asked:
        text = body["messages"][-1]["content"]
        before = COMPONENTS.index(component_of(text))
        assert [f"\n{name}:\n" in text for name in ("Thoughts", "Payoff matrix", "Analysis")] == [
            n < before for n in range(3)
        ]


def stubborn(ask):
    """A function that contradicts its matrix in its first try of each candidate."""
    right = solver_action(payoff_array(parse_chain(f"<payoff>{ask.written['matrix']}</payoff>"))[0])
    with LOCK:
        tries = SEEN.setdefault((ask.item.id, json.dumps(dict(ask.written))), [])
        tries.append(ask.seed)
    return f"choose {right if len(tries) > 1 else 'AQ' if right != 'AQ' else 'DA'}"


SEEN, LOCK = {}, threading.Lock()


def test_an_analysis_that_contradicts_its_matrix_is_made_again_with_another_seed(tmp_path):
    SEEN.clear()
    config = small()
    config.synthesis.analysis.teacher = f"{__name__}:stubborn"
    found, _ = made(config, tmp_path)
    for record in found:
        check(record)
        assert record["components"]["analysis"]["tries"] == 2
        assert record["components"]["analysis"]["teacher"] == f"{__name__}:stubborn"
    assert all(len(set(seeds)) == 2 for seeds in SEEN.values())


def nothing(ask):
    return None


def number(ask):
    return 7


def broken(ask):
    raise RuntimeError("no such\nthing")


def test_prompts_without_a_chain_are_told_and_left_out(tmp_path):
    config = small()
    config.synthesis.response.teacher = f"{__name__}:nothing"
    found, data = made(config, tmp_path)
    assert not data and all("chain" not in record for record in found)
    report = json.loads((tmp_path / "report.json").read_text())["tasks"]
    assert report["math"]["rejected"] == {"response was not written": 6} and report["overall"]["kept"] == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response.teacher", f"{__name__}:number", "config.synthesis.response.teacher=.*: gave int; it must"),
        ("response.teacher", f"{__name__}:broken", "RuntimeError: no such thing"),
        ("response.teacher", "nowhere:made", "config.synthesis.response.teacher='nowhere:made'"),
        ("teacher", "oracle", "config.synthesis.teacher='oracle': must be one of truths, server, engine"),
        ("teacher", "server", "config.synthesis.thinking.endpoints is empty"),
        ("matrix.teacher", "engine", "config.synthesis.matrix.model is empty: name the folder"),
        ("temperature", -1.0, "config.synthesis.temperature=-1"),
        ("analyze", "nobody", "config.synthesis.analyze='nobody': must be teacher or solver"),
        ("candidates", 0, "config.synthesis.candidates=0"),
        ("api_key_env", "NO_SUCH_KEY", None),
    ],
)
def test_a_teacher_that_cannot_work_is_one_line(tmp_path, field, value, message):
    config = small()
    section, _, name = field.rpartition(".")
    (config.synthesis[section] if section else config.synthesis)[name] = value
    if message is None:
        config.synthesis.update(teacher="server", model="m", endpoints=("http://127.0.0.1:9/v1",))
        message = "config.synthesis.api_key_env=NO_SUCH_KEY: this environment variable is not set"
    with pytest.raises(UserError, match=message) as caught:
        synthesize(config, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("parts/*"))


def test_records_of_another_config_are_kept(tmp_path):
    _, data = made(small(), tmp_path)
    changed = small(candidates=2)
    with pytest.raises(
        UserError, match=r"another config.synthesis.candidates \(3, now 2\); name a new --workdir"
    ):
        synthesize(changed, tmp_path)
    assert made(small(patience_s=1.0, price_out=3.0), tmp_path)[1] == data
    (tmp_path / "parts" / "00000000.jsonl").write_text((tmp_path / "parts" / "00000002.jsonl").read_text())
    with pytest.raises(UserError, match="record 1 is of another prompt"):
        synthesize(small(), tmp_path)


def test_a_config_may_be_mended_until_there_is_a_record(tmp_path):
    broken = small()
    broken.synthesis.thinking.teacher = f"{__name__}:broken"
    with pytest.raises(UserError, match="no such thing"):
        synthesize(broken, tmp_path)
    assert len(made(small(), tmp_path)[0]) == 6


def test_the_folder_of_a_training_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds a training run; name a new --workdir"):
        synthesize(small(), tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def odd_reward(features, config):
    """No number for what chooses to answer."""
    reward = REWARDS["cobb_douglas"](features, config)
    return reward.replace(welfare=jnp.where(features.response_words > 8, jnp.nan, reward.welfare))


def test_a_reward_that_is_no_number_comes_last(server, tmp_path):
    config = served(server, candidates=6)
    config.reward.fn = f"{__name__}:odd_reward"
    found, _ = made(config, tmp_path)
    told = [record["candidates"] for record in found]
    assert any(each.get("welfare", 0) is None for group in told for each in group)
    for record in found:
        known = [each["welfare"] for each in record["candidates"] if each.get("welfare") is not None]
        assert record.get("welfare") == max(known, default=None)


def test_the_data_set_is_read_back_from_both_its_forms(tmp_path):
    found, _ = made(small(), tmp_path)
    names = ("math", "ambig_qa", "wildguard")
    tasks = {name: TASKS[name] for name in names}
    for source in (f"jsonl:{tmp_path / 'train.jsonl'}", f"tfds:chains:{tmp_path / 'tfds'}"):
        config = DataConfig(source=source, test_share=0.0, tasks=names)
        items = sources.load_items(config, tasks, "train")
        read = [(item.name, item.task, item.ground_truth, item.intent, list(item.messages)) for item in items]
        assert sorted(read, key=lambda row: row[0]) == sorted(
            ((r["id"], r["task"], r["truth"], r["intent"], r["messages"]) for r in found),
            key=lambda row: row[0],
        )
    stored = open_sets(f"chains:{tmp_path / 'tfds'}", "train", names).rows(range(6))
    assert [row.record for row in stored] == [r for name in names for r in found if r["task"] == name]
