"""A wrong value is one line that names the section and the field it stands in."""

import pytest

from gtalign_jax import config as config_lib
from gtalign_jax.errors import UserError
from gtalign_jax.run.settings import check_batches, make_settings, run_tasks

CONFIG = "--config=configs/quickstart.py:tiny"


def settings_of(*flags):
    command = ["prog", CONFIG, "--workdir=x", *(f"--config.{flag}" for flag in flags)]
    return make_settings(config_lib.parse_command(command, {"workdir": ""})[0])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("policy_optimizer.lr=0.0", "lr=0.0: must be positive"),
        ("sft_optimizer.schedule=linear", "schedule='linear': must be constant or cosine"),
        ("critic_optimizer.lr=-1.0", "lr=-1.0: must be positive"),
        ("algorithm.epochs=0", "epochs=0: must be positive"),
        ("algorithm.loss=hinge", "loss='hinge': must be one of clip, cispo or module:function"),
        ("mesh.tensor=0", "tensor=0: must be at least 1, or -1 for the devices that are left"),
        (
            "data.source=web",
            "source='web': must be synthetic or gtalign, or a kind of jsonl:PATH, parquet:PATH, ",
        ),
        ("data.source=jsonl:", "source='jsonl:': must be synthetic or gtalign"),
        ("data.splits=('train',)", "splits=('train',): name two, the one to train on first"),
        ("data.test_share=1.5", "test_share=1.5: must be from 0 to 1"),
        ("start.param_dtype=int8", "param_dtype='int8': must be float32 or bfloat16"),
        ("lora.rank=-1", "rank=-1: must be 0 (no adapters) or more"),
        ("sft.pack=-1", "pack=-1: must be 0 or the length of a row"),
        ("align.rollout_prompts=3", "rollout_prompts=3: must divide prompts=2"),
        ("engine.kind=trt", "kind='trt': use one of embedded, vllm, sglang, openai"),
        ("engine.rows=-1", "rows=-1: must be 0 (off) or positive"),
        ("engine.limits.thinking=-1", "thinking=-1: give 0 or more tokens, or None"),
        ("engine.limits.thinking=9", "limits: only the grammar knows blocks; set grammar"),
        ("sampling.top_p=0.0", "top_p=0.0: must be in (0, 1]"),
        ("buckets.prompt=(8,4)", "prompt=(8, 4): give positive sizes, increasing"),
        ("features.workers=-1", "workers=-1: must be 0 or more"),
        ("evaluate.temperature=-1.0", "temperature=-1.0: must be 0 (greedy) or positive"),
        ("steer.policy=free", "policy='free': must be one of "),
        ("checkpoint.every=0", "every=0: must be at least 1"),
    ],
)
def test_a_wrong_value_names_its_section(flag, message):
    section = flag.partition("=")[0].rpartition(".")[0]
    if message.startswith("limits"):
        section = "engine"
    with pytest.raises(UserError) as error:
        settings_of(flag)
    assert str(error.value).startswith(f"config.{section}.{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "shards", "message"),
    [
        (["sft.microbatches=3"], 1, r"config\.sft\.prompts=4: must be a multiple of 3 .* times 1 \(devices"),
        ([], 4, r"config\.align\.prompts=2: must be a multiple of 1 .* times 4 \(devices"),
        (["algorithm.minibatches=2", "algorithm.microbatches=2"], 1, r"config\.align\.prompts=2: .* of 4 "),
    ],
)
def test_batches_that_do_not_divide_are_refused_where_a_phase_runs(flags, shards, message):
    check_batches(settings_of(), 2)
    with pytest.raises(UserError, match=message):
        check_batches(settings_of(*flags), shards)
    check_batches(settings_of(*flags, "sft.steps=0", "align.steps=0"), shards)


def test_what_a_source_calls_its_fields_is_set_one_by_one():
    fields = settings_of("data.fields.truth=gold").data.fields
    assert (fields.question, fields.truth) == ("question", "gold")
    with pytest.raises(UserError, match=r"config\.data\.fields\.answer: no such field; known: id, messages"):
        settings_of("data.fields.answer=gold")


def test_a_task_in_a_module_is_not_asked_for_until_it_is_needed():
    settings = settings_of("data.tasks=('no_such_module:X','math')")
    with pytest.raises(UserError, match="config.data.tasks='no_such_module:X': No module named"):
        run_tasks(settings.data)
