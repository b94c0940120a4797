"""A wrong value is one line that names the section and the field it stands in."""

import pytest

from gtalign_jax import config as config_lib
from gtalign_jax.errors import UserError
from gtalign_jax.run.settings import make_settings

CONFIG = "--config=configs/quickstart.py:tiny"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("policy_optimizer.lr=0.0", "lr=0.0: must be positive"),
        ("sft_optimizer.schedule=linear", "schedule='linear': must be constant or cosine"),
        ("critic_optimizer.lr=-1.0", "lr=-1.0: must be positive"),
        ("algorithm.epochs=0", "epochs=0: must be positive"),
        ("algorithm.loss=hinge", "loss='hinge': must be one of clip, cispo or module:function"),
        ("mesh.tensor=0", "tensor=0: must be at least 1, or -1 for the devices that are left"),
        ("data.source=web", "source='web': must be synthetic or gtalign"),
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
    config, _ = config_lib.parse_command(["prog", CONFIG, "--workdir=x", f"--config.{flag}"], {"workdir": ""})
    section = flag.partition("=")[0].rpartition(".")[0]
    if message.startswith("limits"):
        section = "engine"
    with pytest.raises(UserError) as error:
        make_settings(config)
    assert str(error.value).startswith(f"config.{section}.{message}")
    assert "\n" not in str(error.value)
