"""SFT on a file of chains: what is learnt is what stands there, and nothing that is held out."""

import json
import logging

import pytest

from configs import quickstart
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.run.job import make_job
from gtalign_jax.synthesis.job import synthesize
from tests.synthesis.conftest import small


def taught(path):
    """A tiny run that learns from a file."""
    config = quickstart.get_config("tiny")
    config.data.update(tasks=("math", "ambig_qa", "wildguard"), train_per_task=8)
    config.model.num_layers, config.max_new_tokens, config.buckets.completion = 1, 400, (400,)
    config.sft.update(prompts=2, demonstrations=str(path))
    return config


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """The data set of a synthesis."""
    folder = tmp_path_factory.mktemp("chains")
    synthesize(small(), folder)
    return folder / "train.jsonl"


def test_a_run_learns_the_chains_of_the_file(chains, tmp_path):
    job = make_job(taught(chains), tmp_path)
    texts = [job.engine.tokenizer.decode(c[:-1]) for row in job.demonstrations for c in row.completions]
    assert texts == [record["chain"] for record in jsonl.read(chains)] and len(texts) == 6
    prompts = [job.engine.tokenizer.decode(row.prompt) for row in job.demonstrations]
    for prompt, record in zip(prompts, jsonl.read(chains), strict=True):
        assert record["messages"][-1]["content"] in prompt
    assert len(job.train.items) == 24  # alignment goes on with the run's own prompts


def test_what_is_held_out_is_not_learnt(chains, tmp_path, caplog):
    asked = [record["messages"] for record in jsonl.read(chains)]
    config = taught(tmp_path / "more.jsonl")
    job = make_job(taught(chains), tmp_path / "run")
    held_out = job.test.items[0].messages[-1]["content"]
    lines = [{"messages": messages, "chain": "a chain"} for messages in asked]
    jsonl.write(tmp_path / "more.jsonl", [*lines, {"question": held_out, "chain": "a chain"}])
    with caplog.at_level(logging.WARNING):
        job = make_job(config, tmp_path / "again")
    assert len(job.demonstrations) == 6
    assert "1 demonstrations of" in caplog.text and "are left out" in caplog.text
    jsonl.write(tmp_path / "more.jsonl", [{"question": held_out, "chain": "a chain"}])
    with pytest.raises(UserError, match="all its prompts are held out; name another file"):
        make_job(config, tmp_path / "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Why?"}, "chain None: must be text"),
        ({"chain": "x"}, "neither question nor messages"),
        ({"question": " ", "chain": "x"}, "the last message or the chain is empty"),
        ({"question": "Why?", "chain": " "}, "the last message or the chain is empty"),
        ({"messages": [{"role": "user"}], "chain": "x"}, r"messages\[0\].content None: must be text"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, message):
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps({"question": "Why?", "chain": "x"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"chains.jsonl:2: {message}"):
        make_job(taught(path), tmp_path / "run")


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: cannot be read"):
        make_job(taught(tmp_path / "nowhere.jsonl"), tmp_path / "run")
