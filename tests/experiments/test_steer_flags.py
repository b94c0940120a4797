"""Flags of the steering command that do not go together, before a model is read."""

import json

import pytest

from experiments import steer


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --prompt=TEXT, or --prompts=FILE with --out=FILE"),
        (["--prompt=x", "--prompts=P"], "give --prompt=TEXT, or --prompts=FILE with --out=FILE"),
        (["--prompts=P"], "--prompts needs --out=FILE"),
        (["--prompt=x", "--policy=free"], "--policy='free': use one of per_token, "),
        (["--prompt=x", "--policy=nowhere:f"], "--policy='nowhere:f': "),
        (["--prompt=x", "--amounts=1,2"], "--amounts=1,2: three numbers, for DA, CQ, AQ, or a rollout file"),
        (["--prompt=x", "--amounts=1,-2,1"], "--amounts=1,-2,1: three numbers"),
        (["--prompt=x", "--amounts=nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompt=x", "--tokens_per_s=0"], "--tokens_per_s=0.0: must be positive"),
        (["--prompt=x", "--unusable=again"], "--unusable=again: a greedy second try"),
    ],
)
def test_a_flag_is_named_with_its_mend(refused, flags, said):
    assert said in refused(steer.main, ["--model=none", *flags])


@pytest.mark.parametrize(
    ("line", "prices", "said"),
    [
        ({"prompt": "x"}, "0,dear", "--prices: 'dear' is no price; write numbers, below or above"),
        ({}, "0", "P.jsonl:1: give one of prompt, messages, got none"),
        ({"token_ids": [1]}, "0", "P.jsonl:1: give one of prompt, messages, got none"),
        ({"messages": [{"role": "user"}]}, "0", "P.jsonl:1: messages must be a list of objects"),
    ],
)
def test_a_bad_line_or_price_is_named(refused, tmp_path, line, prices, said):
    prompts = tmp_path / "P.jsonl"
    prompts.write_text(json.dumps(line) + "\n")
    flags = ["--model=none", f"--prompts={prompts}", f"--out={tmp_path / 'O.jsonl'}", f"--prices={prices}"]
    assert said in refused(steer.main, flags)
    assert not list(tmp_path.glob("O*"))
