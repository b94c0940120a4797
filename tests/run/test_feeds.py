"""What the steps of a run train on: a stream beside the same rows in memory, and killed in mid-epoch."""

import json
import logging

import jax
import jax.numpy as jnp
import pytest

from configs import quickstart
from gtalign_jax.data.builders.records import write_records
from gtalign_jax.data.order import Batching, Order
from gtalign_jax.data.stream import Left, Reading, Stream
from gtalign_jax.errors import UserError
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.run.describe import build_data
from gtalign_jax.run.health import HealthConfig
from gtalign_jax.run.job import make_job
from gtalign_jax.run.log import MetricsConfig, RunLog
from gtalign_jax.run.phase import CheckpointConfig, Phase, open_session, run_phase
from gtalign_jax.run.settings import make_settings
from gtalign_jax.types import ModelState, TrainState

PROMPTS = 4


def config_of(folder, *tasks, **data):
    """A tiny run on what is built in a folder."""
    config = quickstart.get_config("tiny")
    config.data.update(source=f"tfds:embedded:{folder}", tasks=tasks, workers=0, **data)
    config.align.update(prompts=PROMPTS, steps=20)
    config.sft.update(prompts=PROMPTS)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded tasks as data sets, and a starting model in `model`."""
    folder = tmp_path_factory.mktemp("sets")
    config = quickstart.get_config("tiny")
    build_data(make_settings(config).data, f"embedded:{folder}")
    make_job(config, folder / "run")
    (folder / "run" / "init").rename(folder / "model")
    return folder


def jobs(folder, tmp_path, *tasks, **data):
    """(the job with rows in memory, the job that streams them)."""
    made = []
    for rows in (1000, 0):
        config = config_of(folder, *tasks, train_per_task=rows, **data)
        config.start.path = str(folder / "model")
        made.append(make_job(config, tmp_path / str(rows)))
    return made


@pytest.mark.parametrize("data", [{}, {"weights": (3.0, 1.0)}, {"bucket_steps": 2}])
def test_streamed_prompts_are_those_in_memory_in_the_same_order(folder, tmp_path, data):
    """Over two epochs; nothing of these rows is left out."""
    held, streamed = jobs(folder, tmp_path, "math", "wildguard", **data)
    assert len(held.train.items) == 32 and not streamed.train.items and not streamed.demonstrations
    for k in range(16):
        a, b = (job.feeds.prompts.batch(k) for job in (held, streamed))
        assert [row.tokens for row in a] == [row.tokens for row in b]
        assert [row.item.ground_truth for row in a] == [row.item.ground_truth for row in b]
    assert streamed.feeds.prompts.state(16) == {"rows": 32, "position": 64} and not held.feeds.prompts.state(
        16
    )


def test_streamed_demonstrations_are_functions_of_the_seed_and_the_row(folder, tmp_path):
    _, streamed = jobs(folder, tmp_path, "math")
    feed = streamed.feeds.demonstrations
    shown = {tuple(row.prompt): row.completions for k in range(4) for row in feed.batch(k)}
    assert len(shown) == 16 and all(len(chains) == 2 for chains in shown.values())
    text = streamed.engine.tokenizer.decode(next(iter(shown.values()))[0])
    assert text.startswith("<thinking>") and text.endswith("<|im_end|>")
    again = {tuple(row.prompt): row.completions for k in range(4, 8) for row in feed.batch(k)}
    assert again == shown


def test_a_streamed_run_makes_its_model_from_its_first_rows(folder, tmp_path):
    job = make_job(config_of(folder, "math", "medium", train_per_task=0), tmp_path)
    assert (job.model_folder / "config.json").is_file()
    assert len(job.feeds.prompts.batch(0)) == PROMPTS


def test_rows_of_the_test_split_and_too_long_ones_are_passed_over(folder, tmp_path, caplog):
    rows = [{"question": f"What is {i} + 1?", "truth": i + 1} for i in range(12)]
    rows[3]["question"] = "What is one? " * 99
    write_records(tmp_path, "mine", "math", {"train": rows, "test": rows[5:7]})
    config = config_of(folder, "math", train_per_task=0, decontaminate=True)
    config.data.source = f"tfds:mine:{tmp_path}"
    config.start.path = str(folder / "model")
    job = make_job(config, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        met = [row.item.id for k in range(9) for row in job.feeds.prompts.batch(k)]
    assert sorted(met) == sorted([i for i in range(12) if i not in (3, 5, 6)] * 4)
    assert "row 3: has over 96 tokens (raise the last of config.buckets.prompt" in caplog.text
    assert "stands in the test split, and is left out (1 so far)" in caplog.text


def test_histories_that_are_cut_in_a_stream_are_said_and_counted(folder, tmp_path, caplog):
    """Of prompts and of demonstrations; the rows are those in memory."""
    past = [{"role": role, "content": "much was said " * 16} for role in ("user", "assistant")]
    rows = [{"messages": [*past, {"role": "user", "content": f"What is {i} + 1?"}]} for i in range(12)]
    rows += [{"question": f"What is {i} + 2?"} for i in range(4)]
    rows = [{**row, "truth": 3} for row in rows]
    write_records(tmp_path, "mine", "math", {"train": rows, "test": rows[:1]})
    fed = []
    for number in (0, 16):
        config = config_of(folder, "math", train_per_task=number, too_long="cut")
        config.data.source = f"tfds:mine:{tmp_path}"
        config.start.path = str(folder / "model")
        fed.append(make_job(config, tmp_path / str(number)).feeds)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        streamed, held = ([feeds.prompts.batch(k) for k in range(4)] for feeds in fed)
    assert [[row.tokens for row in batch] for batch in streamed] == [
        [row.tokens for row in batch] for batch in held
    ]
    said = [line for line in caplog.messages if "was over 96 tokens and lost its oldest turns" in line]
    assert len(said) == 2 and said[1].endswith("(10 so far)")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        shown = [row.prompt for k in range(4) for row in fed[0].demonstrations.batch(k)]
    assert shown == [row.tokens for batch in streamed for row in batch]
    assert sum("lost its oldest turns" in line for line in caplog.messages) == 2


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("sft", "pack", 256, "config.sft.pack: needs demonstrations in memory"),
        ("sft", "epochs", 2, "config.sft.epochs: needs demonstrations in memory"),
        ("align", "prompts", 32, "config.align.prompts=32: there are only 16 training prompts"),
        ("data", "tasks", ("math", "poetry"), "config.data.tasks: 'poetry' is not a task"),
        ("data", "weights", (1.0, 2.0), r"weights=\(1.0, 2.0\): give one above 0 for each of tasks"),
        ("data", "splits", ("validation", "test"), "has no split 'validation'; name train, test in"),
        ("data", "source", "tfds:other:/nowhere", "no data set /nowhere/other/math; build it with"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line(folder, tmp_path, section, field, value, message):
    config = config_of(folder, "math", train_per_task=0)
    config.start.path = str(folder / "model")
    config[section][field] = value
    with pytest.raises(UserError, match=message) as error:
        make_job(config, tmp_path)
    assert "\n" not in str(error.value)


# --- in a phase ------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def train(workdir, met, end=None):
    """A phase of 12 steps over 30 rows of which some are left out; `met` gets what each step trained on."""

    def make(numbers):
        return [Left(f"row {n}", "is odd") if n % 4 == 1 else n for n in numbers]

    feed = Stream(make, Order((30,), 3), Batching(4, lambda row: 8, 3), Reading())

    def step(state, k):
        if k == end:
            raise Killed
        met[k] = feed.batch(k)
        return state.replace(step=state.step + 1), {"loss/sft": 1.0}

    zero = ModelState(params={"w": jnp.zeros(2)}, opt_state={"m": jnp.zeros(1)})
    log = RunLog(workdir, ("sft",), MetricsConfig(), clock=lambda: 0.0)
    first = TrainState(policy=zero, critic=None, step=jnp.int32(0), rng=jax.random.key(0))
    checkpoints, mesh = CheckpointConfig(every=3), make_mesh(MeshConfig())
    with open_session(workdir, mesh, log, checkpoints, HealthConfig()) as session:
        run_phase(session, Phase("sft", 12, step, feed=feed), first)


def test_a_phase_goes_on_at_the_row_that_its_checkpoint_names(tmp_path):
    """Killed twice in mid-epoch: steps train on what they would have, and meet every row once an epoch."""
    whole, met = {}, {}
    train(tmp_path / "whole", whole)
    for end in (5, 10, None):
        again = {}
        if end is None:
            train(tmp_path / "killed", again)
        else:
            with pytest.raises(Killed):
                train(tmp_path / "killed", again, end)
        met |= again
    assert met == whole and min(again) == 9
    kept = [row for k in range(12) for row in met[k]]
    usable = [n for n in range(30) if n % 4 != 1]
    assert sorted(kept[:22]) == sorted(kept[22:44]) == usable
    meta = json.loads((tmp_path / "killed" / "checkpoints" / "sft" / "9" / "meta" / "metadata").read_text())
    assert meta["data"]["rows"] == 30 and 36 < meta["data"]["position"] < 60
