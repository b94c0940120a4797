"""Every number of every section has its range: what is outside ends in one line that names the field."""

import dataclasses
import math
import time

import pytest

from configs import base
from gtalign_jax import config as config_lib
from gtalign_jax.errors import MAX_SEED, UserError
from gtalign_jax.run.job import make_job
from gtalign_jax.run.settings import ALL_SECTIONS as ALL
from gtalign_jax.run.settings import make_settings, run_tasks

BAD = (math.nan, math.inf, -1e9)
ALLOWED = {  # finite is enough
    ("reward", "rho", -1e9),
    ("algorithm", "component_weights", -1e9),
    ("algorithm", "fluency_floor", -1e9),
}


def _numbers(cls):
    """(field, whether it is a tuple) of the fields that hold numbers."""
    for field in dataclasses.fields(cls):
        value = getattr(cls(), field.name)
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, int | float) and not isinstance(first, bool):
            yield field.name, value


CASES = [
    (section, name, default, bad)
    for section, cls in ALL.items()
    for name, default in [
        *_numbers(cls),
        *([("component_weights", (1.0, 1.0))] if section == "algorithm" else []),
    ]
    for bad in BAD
    if (section, name, bad) not in ALLOWED
]


def test_the_table_is_whole():
    assert len(CASES) > 3 * 110
    assert {section for section, *_ in CASES} == set(ALL) - {"metrics"}  # which has no number


@pytest.mark.parametrize(("section", "name", "default", "bad"), CASES)
def test_a_number_out_of_its_range_is_one_line(section, name, default, bad):
    first = default[0] if isinstance(default, tuple) else default
    value = int(bad) if isinstance(first, int) and math.isfinite(bad) else bad
    value = (value, *default[1:]) if isinstance(default, tuple) else value
    clock = time.monotonic()
    with pytest.raises(UserError) as error:
        config_lib.build(ALL[section], {name: value}, section)
    assert str(error.value).startswith(f"config.{section}.{name}=") and "\n" not in str(error.value)
    assert time.monotonic() - clock < 1.0


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("reward", "alpha", 2.0),
        ("reward", "alpha", -0.1),
        ("reward", "total_words", (9.0, 3.0)),
        ("reward", "rho", math.nan),
        ("algorithm", "gamma", 5.0),
        ("algorithm", "lam", 1.5),
        ("sft_optimizer", "betas", (0.9, 1.0)),
        ("sft_optimizer", "eps", 0.0),
        ("sampling", "temperature", 1e-300),
        ("evaluate", "temperature", 1e-300),
        ("evaluate", "samples", 0),
        ("evaluate", "seed", MAX_SEED + 1),
        ("data", "seed", -1),
        ("data", "tasks", ("math", "math")),
        ("data", "tasks", ()),
        ("data", "tasks", "math"),
        ("data", "tasks", tuple("math")),
        ("align", "group_size", 0),
        ("align", "prompts", 0),
        ("align", "prompts", 2.0),
        ("align", "dump_every", 0),
        ("sft", "chains", 0),
        ("sft", "microbatches", 0),
        ("model", "hidden_size", 0),
        ("model", "num_heads", 3),
        ("model", "num_kv_heads", 0),
        ("model", "head_dim", 33),
        ("judge", "top_p", 1.5),
        ("buckets", "prompt", (8.5,)),
        ("sft", "chains", 10**9),
        ("start", "vocab_size", 10),
        ("metrics", "wandb_mode", "zz"),
        ("engine", "push_every", 0),
    ],
)
def test_a_value_that_cannot_work_is_one_line(section, name, value):
    with pytest.raises(UserError) as error:
        config_lib.build(ALL[section], {name: value}, section)
    assert str(error.value).startswith(f"config.{section}.{name}") and "\n" not in str(error.value)


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match=r"^config\.data\.tasks: 'poetry' is not a task; known: math, "):
        run_tasks(config_lib.build(ALL["data"], {"tasks": ("math", "poetry")}, "data"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["seed=-1"], "config.seed=-1: must be a whole number from 0"),
        (["max_new_tokens=0"], "config.max_new_tokens=0: must be"),
        (["sft_optimizer.warmup=4"], "config.sft_optimizer.warmup=4: must be below the 4 updates"),
        (["policy_optimizer.warmup=9"], "config.policy_optimizer.warmup=9: must be below the 4 updates"),
        (["sampling.temperature=0.0"], "config.sampling.temperature=0: "),
        (["align.group_size=1"], "config.align.group_size=1: "),
        (["align.algorithm=gdpo", "algorithm.components=()"], "config.algorithm.components: names none of"),
        (["sampling.repetition_penalty=1.1"], "config.sampling.repetition_penalty=1.1: draws from another"),
        (
            ["align.algorithm=gdpo", "algorithm.components=('user','nosuch')"],
            "config.algorithm.components: 'no",
        ),
    ],
)
def test_values_that_are_wrong_together_are_one_line(flags, message):
    command = [
        "prog",
        "--config=configs/quickstart.py:tiny",
        "--workdir=x",
        *(f"--config.{f}" for f in flags),
    ]
    config, _ = config_lib.parse_command(command, {"workdir": ""})
    with pytest.raises(UserError) as error:
        make_settings(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    if message.startswith(("config.policy", "config.sampling", "config.align")):
        config.align.steps = 0  # then nothing is aligned
        make_settings(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(nosuch=3), "config.nosuch: no such field; known: algorithm, align"),
        (lambda config: config.__delattr__("align"), "config.align: is missing; start from configs/base.py"),
        (lambda config: config.__delattr__("seed"), "config.seed: is missing; start from configs/base.py"),
    ],
)
def test_the_fields_at_the_top_are_those_of_base(change, message):
    config = base.get_config()
    change(config)
    with pytest.raises(UserError) as error:
        make_settings(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("align.algorithm=math:sin", "config.align.algorithm='math:sin': TypeError: "),
        ("reward.fn=math:sin", "config.reward.fn='math:sin': TypeError: "),
        ("reward.fn=json:dumps", "config.reward.fn='json:dumps': TypeError: "),
        ("reward.fn=builtins:max", "config.reward.fn='builtins:max': "),
        ("algorithm.scale=math:sin", "config.algorithm.scale='math:sin': TypeError: "),
        ("algorithm.loss=math:sin", "config.algorithm.loss='math:sin': TypeError: "),
        ("algorithm.loss=jax.numpy:stack", "config.algorithm.loss='jax.numpy:stack': "),
        ("start.attention=splash", "config.start.attention='splash': needs a TPU"),
        ("start.attention=cudnn", "config.start.attention='cudnn': needs a GPU"),
        ("checkpoint.best=nosuch", "config.checkpoint.best='nosuch': must be a key of metrics.jsonl"),
    ],
)
def test_what_cannot_work_here_is_refused_before_any_work(tmp_path, flag, message):
    command = [
        "prog",
        "--config=configs/quickstart.py:tiny",
        f"--config.{flag}",
        "--config.checkpoint.keep_best=1",
    ]
    config, _ = config_lib.parse_command(command, {})
    with pytest.raises(UserError) as error:
        make_job(config, tmp_path)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
