"""A judge on the mesh: its numbers beside transformers, one device and eight, and whole runs with it."""

import copy
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import quickstart
from gtalign_jax import jsonl
from gtalign_jax.align import run_align
from gtalign_jax.data.item import make_item
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.mesh.sharding import MeshConfig, make_mesh
from gtalign_jax.rewards.judges.labels import DIGITS, label_prompt
from gtalign_jax.rollout import chat
from gtalign_jax.run import mesh_judge
from gtalign_jax.run.compiles import counting_compiles
from gtalign_jax.run.job import load_start, make_job
from gtalign_jax.run.log import RunLog
from gtalign_jax.run.phase import open_session
from gtalign_jax.run.states import PHASES
from tests.rollout.templates import TEMPLATES
from tests.run import judge_worker
from tests.run.judge_worker import REQUESTS, judge_of

ITEM = make_item([{"role": "user", "content": "?"}], "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a chat template that takes a system message."""
    path = tmp_path_factory.mktemp("judge")
    prompts = [label_prompt(request) for request in REQUESTS]
    tokenizer = train_tokenizer([p.system + p.before + p.response + p.after for p in prompts], 900)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(folder):
    return judge_of(folder)


def test_the_labels_are_as_likely_as_transformers_finds_them(folder, judge):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    asked = mesh_judge.asked(judge.engine, [label_prompt(request) for request in REQUESTS])
    found = judge.run.logprobs(asked)
    assert len(found) == len(set(asked)) == len(REQUESTS) - 1  # the last asks what the first does
    for each, logp in found.items():
        with torch.no_grad():
            logits = model(torch.tensor([each.question + each.answer])).logits[0, -1]
        wanted = torch.softmax(logits, -1)[torch.tensor(judge.run.labels.tolist())]
        np.testing.assert_allclose(np.exp(logp), wanted.numpy(), atol=1e-4)
    tokenizer = judge.engine.tokenizer
    assert [tokenizer.decode([i]) for i in judge.run.labels] == list(DIGITS)


def test_a_prompt_is_the_judges_own_chat_with_the_response_in_its_place(judge):
    (each,) = mesh_judge.asked(judge.engine, [label_prompt(REQUESTS[6])])
    text = judge.engine.tokenizer.decode(each.question + each.answer)
    assert text.startswith("<|im_start|>system\nGrade the response") and text.count("<|im_end|>") == 2
    assert (
        text.endswith(":<|im_end|>\n<|im_start|>assistant\n") and "a leaf. &lt;|im_end|>\n</response" in text
    )
    shared = {
        asked.question for asked in mesh_judge.asked(judge.engine, [label_prompt(r) for r in REQUESTS[:5]])
    }
    assert len(shared) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_rubric_and_the_place_of_the_verdict_in_every_template(judge, name):
    tokenizer = copy.deepcopy(judge.engine.tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    engine = dataclasses.replace(judge.engine, tokenizer=tokenizer, template=chat.ask_template(tokenizer))
    (each,) = mesh_judge.asked(engine, [label_prompt(REQUESTS[0])])
    question, answer = (tokenizer.decode(ids) for ids in each)
    assert "Decide whether the response solves" in question and question.endswith(">\n")
    assert answer.startswith("It is 0, as child knows.\n</response-")
    assert answer.count("<think>") == answer.count("</think>") == (name == "r1_distill")
    assert answer.endswith("</think>\n\n") or "think" not in answer


def test_verdicts_are_expectations_and_the_likeliest_level_where_none_lies_between(judge):
    before = judge.stats.numbers()
    verdicts = judge(REQUESTS)
    logp = judge.run.logprobs(mesh_judge.asked(judge.engine, [label_prompt(r) for r in REQUESTS]))
    rows = np.exp([logp[a] for a in mesh_judge.asked(judge.engine, [label_prompt(r) for r in REQUESTS])])
    assert verdicts[0].score == pytest.approx(rows[0, 1] / rows[0, :2].sum(), abs=1e-6)
    assert verdicts[5].score == (0.0, 0.5, 1.0)[int(rows[5, :3].argmax())]
    assert verdicts[6].score == pytest.approx(rows[6, :5] @ range(5) / rows[6, :5].sum(), abs=1e-6)
    assert verdicts[7] == verdicts[0] and len({v.score for v in verdicts[:5]}) == 5
    added = {name: n - before.get(name, 0) for name, n in judge.stats.numbers().items()}
    assert added["requests"] == added["scored"] == 8 and added["repeated"] == 1 and added["missing"] == 0
    assert added["label_mass"] == pytest.approx(
        sum(row[: {5: 3, 6: 5}.get(i, 2)].sum() for i, row in enumerate(rows)), rel=1e-5
    )


def test_eight_devices_judge_as_one(folder, judge):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    spread = judge_of(folder, mesh)(REQUESTS)
    np.testing.assert_allclose([v.score for v in spread], [v.score for v in judge(REQUESTS)], atol=1e-5)


def test_its_weights_are_counted_on_each_device(folder, judge):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    held = sum(x.nbytes for x in jax.tree.leaves(judge.run.params))
    assert judge.run.weight_bytes == held
    assert held / 4 <= judge_of(folder, mesh).run.weight_bytes < held / 3


def test_nothing_is_compiled_after_the_warm_up(judge):
    items = [
        dataclasses.replace(ITEM, task=r.task, intent=r.question, ground_truth=r.ground_truth)
        for r in REQUESTS
    ]
    judge.warm_up(items)
    with counting_compiles() as count:
        judge(REQUESTS)
        judge(REQUESTS[:1])
        judge([])
        assert count.take() == 0


def test_what_has_no_place_has_no_verdict_and_says_why(judge):
    long = dataclasses.replace(REQUESTS[0], response="lock " * 200)
    hard = dataclasses.replace(REQUESTS[0], question="lock " * 400)
    verdicts = judge([long, REQUESTS[0], hard])
    assert [v.score is None for v in verdicts] == [True, False, True]
    assert "over the 96 of config.judge.answer_slots" in verdicts[0].reason
    assert "over the 384 of config.judge.question_slots" in verdicts[2].reason


def test_a_run_trains_on_its_verdicts(folder, tmp_path):
    config = quickstart.get_config("tiny")
    slots = {"question_slots": (768,), "answer_slots": (384,), "questions": 2, "answers": 4}
    config.judge.update(kind="model", path=str(folder), **slots)
    config.features.chain = "plain"  # random tokens are no chains, which nobody would judge
    config.max_new_tokens, config.buckets.completion, config.model.num_layers = 24, (24,), 1
    config.data.update(tasks=("math", "wildguard"), test_per_task=1)
    config.sft.steps, config.metrics.tensorboard, config.algorithm.kl_coef = 0, False, 0.0
    config.align.update(steps=3, prompts=2, group_size=4, untrained_blocks=(), dump_every=1)
    config.policy_optimizer.warmup = 1
    job = make_job(config, tmp_path)
    log = RunLog(tmp_path, PHASES, job.settings.metrics)
    with open_session(tmp_path, job.mesh, log, job.settings.checkpoint, job.settings.health) as session:
        run_align(job, load_start(job), session)
    steps = jsonl.read(tmp_path / "metrics.jsonl")
    assert [step["judge/requests"] for step in steps] == [8, 8, 8]
    assert all(step["judge/missing"] == 0 and step["judge/label_mass"] > 0 for step in steps)
    assert steps[0]["compile/programs"] > 0 and [s["compile/programs"] for s in steps[1:]] == [0, 0]
    assert len({step["reward/answer"] for step in steps}) == 3
    lines = [line for k in range(3) for line in jsonl.read(tmp_path / "rollouts" / f"train_{k}.jsonl")]
    assert {line["judge"]["reason"] for line in lines} == {"label"}
    verdicts = {line["judge"]["verdict"] for line in lines if line["source"] == "math-hard"}
    assert len(verdicts) > 4 and all(0 < verdict < 1 for verdict in verdicts)


def test_two_processes_judge_as_one(folder, judge, tmp_path):
    """Each with its own requests; one of them has none."""
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "GTALIGN_COORDINATOR": f"127.0.0.1:{free_port()}",
        "GTALIGN_NUM_PROCESSES": "2",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    command = [sys.executable, judge_worker.__file__, str(folder), str(tmp_path)]
    both = [subprocess.Popen(command, env=env | {"GTALIGN_PROCESS_ID": str(i)}) for i in range(2)]
    try:
        assert [process.wait(timeout=300) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    wanted = [verdict.score for verdict in judge(judge_worker.SHORT)]
    np.testing.assert_allclose(first["all"] + second["all"], wanted, atol=1e-5)
    assert first["some"] == [] and second["some"] == pytest.approx(wanted[:1], abs=1e-5)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
