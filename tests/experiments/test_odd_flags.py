"""Flags of the wrong kind end in one line that names them, before a model is read."""

import os
import subprocess
import sys

import pytest

from experiments import analyze, generate, steer
from experiments.flag_checks import utf8_text
from gtalign_jax.errors import UserError
from gtalign_jax.rollout import lines
from gtalign_jax.rollout.sampling import SamplingConfig

GENERATE = ["--model=none", "--prompts=none", "--out=none"]
STEER = ["--model=none", "--prompt=x"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (generate, "temperature"),
        (generate, "top_p"),
        (generate, "min_p"),
        (generate, "repetition_penalty"),
        (steer, "temperature"),
        (steer, "price"),
        (analyze, "eps"),
        (analyze, "alpha"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(refused, command, flag, value):
    given = {generate: GENERATE, steer: STEER, analyze: ["a", "b"]}[command]
    assert refused(command.main, [*given, f"--{flag}={value}"]).startswith(f"error: --{flag}=")


@pytest.mark.parametrize("value", [1e-300, 1e-6, 1e6, 1e300])
@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_what_logits_are_divided_by_is_never_extreme(field, value):
    with pytest.raises(ValueError, match=f"{field}=.* from 1e-05 to 100000"):
        SamplingConfig(**{field: value})
    SamplingConfig(temperature=1e-5, repetition_penalty=1e5)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seeds_that_would_repeat_another_are_refused(refused, seed):
    for command, given in ((generate, GENERATE), (steer, STEER)):
        line = refused(command.main, [*given, f"--seed={seed}"])
        assert line == f"error: --seed={seed}: must be from 0 to 4294967295"
    assert "--seed=-1" in refused(analyze.main, ["a", "b", "--seed=-1"])


def test_an_empty_stop_string_is_refused(refused):
    assert "--stop=: must not be empty" in refused(generate.main, [*GENERATE, "--stop=x", "--stop="])


@pytest.mark.parametrize(
    "flags", [["--prompt=Zo\udceb"], ["--system=\udceb", "--prompt=x"], ["--prompt=\ud800"]]
)
def test_text_that_is_not_utf8_is_refused_by_name(refused, flags):
    line = refused(steer.main, ["--model=none", *flags])
    assert line.startswith(f"error: {flags[0].partition('=')[0]}: the text is not UTF-8")


def test_text_is_read_as_utf8_in_the_c_locale():
    assert utf8_text("Zoë".encode().decode("ascii", errors="surrogateescape"), "--prompt") == "Zoë"
    code = (
        "import sys; from experiments.flag_checks import utf8_text; from gtalign_jax.errors import *\n"
        "show = exit_on_user_error(lambda: print(utf8_text(sys.argv[1], 'x') == 'Zo\\xeb', 'Zo\\xeb'))\n"
        "show()"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "Zoë".encode()], env=env, capture_output=True, check=False
    )
    assert done.stdout == b"True Zo\\xeb\n", done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a\ud800"},
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"messages": [{"role": "\ud800", "content": "x"}]},
    ],
)
def test_half_a_surrogate_pair_in_a_prompt_names_its_line(fields):
    with pytest.raises(UserError, match=r"p.jsonl:3: (prompt|messages) holds half a surrogate pair .\\ud"):
        lines.prompt_ids(None, {**fields, "line": 3}, "p.jsonl")
