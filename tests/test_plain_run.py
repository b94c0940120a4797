"""The baseline without the chain: a tiny run whose completions are answers, from cold start to report."""

import json
import logging

import numpy as np
import pytest

from configs import quickstart
from gtalign_jax import jsonl
from gtalign_jax.chain.prompt import PLAIN_INSTRUCTION
from gtalign_jax.data.config import DataConfig
from gtalign_jax.errors import UserError
from gtalign_jax.run import cautions
from gtalign_jax.run.job import make_job
from gtalign_jax.run.settings import make_settings
from gtalign_jax.train import train


@pytest.fixture(scope="module")
def config():
    config = quickstart.get_config("tiny")
    config.data.update(train_per_task=8, test_per_task=1, tasks=("math", "wildguard"), instruction="plain")
    config.features.chain = "plain"
    config.model.update(num_layers=1)
    config.max_new_tokens, config.buckets.completion = 64, (64,)
    config.sft.update(steps=2, prompts=2)
    config.align.update(steps=2, prompts=2, group_size=2, dump_every=1)
    config.policy_optimizer.warmup = 0
    config.evaluate.update(samples=2, prompts=2)
    return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir)
    return workdir


def test_the_cold_start_shows_answers_alone_to_prompts_that_ask_for_one(config, run):
    job = make_job(config, run)
    assert job.untrained == ()
    for demonstration in job.demonstrations:
        assert PLAIN_INSTRUCTION in job.engine.tokenizer.decode(demonstration.prompt)
        for ids in demonstration.completions:
            assert "<" not in job.engine.tokenizer.decode(ids[:-1])


def test_an_answer_that_is_not_blank_earns_welfare_and_no_term_of_the_chain(run):
    lines = [line for path in (run / "rollouts").glob("*.jsonl") for line in jsonl.read(path)]
    assert len(lines) >= 12
    for line in lines:
        assert (line["format_reward"], line["payoff_reward"], line["pareto_score"]) == (0, 0, 0)
        assert (line["score"] > 0) == bool(line["output"].strip()) and line["action"] is None
        np.testing.assert_allclose(
            line["score"], np.sqrt(line["user_reward"] * line["llm_reward"]), rtol=1e-5
        )
        assert line["llm_reward"] < 0.6


def test_the_run_ends_with_a_report_and_steers_nothing(run):
    assert json.loads((run / "summary.json").read_text()).keys() == {"sft", "aligned"}
    assert (run / "report.html").is_file() and jsonl.read(run / "steering.jsonl") == []
    steps = [line for line in jsonl.read(run / "metrics.jsonl") if line["phase"] == "align"]
    assert len(steps) == 2 and all(line["reward/format"] == 0 for line in steps)


def test_the_grammar_of_the_chain_is_refused():
    config = quickstart.get_config("tiny")
    config.features.chain, config.engine.grammar = "plain", True
    with pytest.raises(UserError, match="config.engine.grammar: holds to the chain, which"):
        make_settings(config)


@pytest.mark.parametrize(
    ("fields", "plain", "said"),
    [
        ({}, True, "config.data.instruction=short: asks for a chain"),
        ({"instruction": "full"}, True, "config.data.instruction=full: asks for a chain"),
        ({"instruction": "plain"}, True, ""),
        ({"instruction": "Be kind."}, True, ""),
        ({"source": "gtalign", "instruction": "plain"}, True, "config.data.history=given: the published"),
        ({"source": "gtalign", "instruction": "plain", "history": "turns"}, True, ""),
        ({"instruction": "plain"}, False, "config.data.instruction=plain: asks for no chain"),
        ({"source": "gtalign"}, False, ""),
        (
            {"source": "gtalign", "instruction": "full"},
            False,
            "config.data.history=given: the published",
        ),
        ({"source": "gtalign", "instruction": "full", "history": "flat"}, False, ""),
        ({}, False, ""),
    ],
)
def test_a_prompt_that_asks_for_what_is_not_read_is_said(caplog, fields, plain, said):
    with caplog.at_level(logging.WARNING):
        cautions.of_instruction(DataConfig(**fields), plain)
    assert (
        caplog.text.count("config.data") >= bool(said)
        and said in caplog.text
        and bool(said) == bool(caplog.text)
    )
