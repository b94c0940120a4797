"""What a run leaves out of its prompts is said in its log, with the rows."""

import json
import logging
import types

import jax
import pytest

from configs import quickstart
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.models.config import ModelConfig, RuntimeConfig
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.run import cautions
from gtalign_jax.run.job import make_job

QUESTION = "How many books has Eva now?"


def row(number, turns, words):
    said = [{"role": ("user", "assistant")[i % 2], "content": f"part {i} " * words} for i in range(2 * turns)]
    return {"messages": [*said, {"role": "user", "content": f"{QUESTION} {number}"}], "truth": str(number)}


@pytest.fixture
def config(tmp_path):
    for split in ("train", "test"):
        rows = [row(i, 0, 1) for i in range(6)] + [row(6, 2, 9), row(7, 1, 1), row(8, 0, 1)]
        rows[-1]["messages"][-1]["content"] *= 40
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = quickstart.get_config("tiny")
    config.data.update(source=f"jsonl:{tmp_path}", tasks=("math",), train_per_task=0, test_per_task=0)
    config.buckets.prompt = (128,)
    config.sft.update(steps=0)
    return config


def test_prompts_that_no_bucket_holds_are_named_and_histories_cut_where_asked(config, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        job = make_job(config, tmp_path / "run")
    for split in ("train", "test"):
        rows = "; ".join(f"{tmp_path / split}.jsonl:{number}" for number in (7, 9))
        said = f"2 {split} prompts have over 128 tokens and are dropped ({rows}); raise the last of"
        assert said in caplog.text
    assert len(job.train.items) == 7 and not job.train.cut
    caplog.clear()
    config.data.too_long = "cut"
    with caplog.at_level(logging.WARNING):
        job = make_job(config, tmp_path / "run")
    assert "1 test prompts were over 128 tokens and lost their oldest turns" in caplog.text
    assert f"1 train prompts have over 128 tokens and are dropped ({tmp_path}/train.jsonl:9)" in caplog.text
    assert len(job.train.items) == 8 and job.train.cut == 1
    for item, tokens in zip(job.train.items, job.train.tokens, strict=True):
        text = job.engine.tokenizer.decode(tokens)
        assert item.messages[-1]["content"] in text and job.settings.data.system in text


@pytest.mark.parametrize(
    ("layers", "scan", "told"), [(30, False, True), (30, True, False), (4, False, False)]
)
def test_many_layers_one_by_one_are_said_to_take_long(caplog, layers, scan, told):
    tokenizer = train_tokenizer(["a clear question"] * 3, 300)
    model = ModelConfig(num_layers=layers, runtime=RuntimeConfig(scan_layers=scan))
    cautions.of_start("models/m", Engine(tokenizer, model, (1,)))
    assert ("config.start.scan_layers=False: 30 layers" in caplog.text) == told


@pytest.mark.parametrize(("platform", "told"), [("gpu", True), ("cpu", False)])
def test_accelerators_that_idle_are_told(platform, told, monkeypatch, caplog):
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=platform)] * 4)
    cautions.of_mesh(mesh)
    assert ("config.mesh takes 2 of 4 devices" in caplog.text) is told
