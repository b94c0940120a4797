"""Templates of real models: asked what they do, given messages as they take them, beside transformers."""

import json
import logging
import re
import shutil

import pytest

from configs import quickstart
from experiments import generate, steer
from gtalign_jax.chain.prompt import format_chain
from gtalign_jax.errors import UserError
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.folder import folder_engine
from gtalign_jax.rollout.template import Template, fitted, peculiarities
from gtalign_jax.run.describe import describe_data
from gtalign_jax.run.job import make_job
from gtalign_jax.run.settings import make_settings
from tests.rollout.templates import TEMPLATES, with_template

FOLDS, MERGES = {"takes_system": False}, {"takes_repeats": False}
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
FOUND = {
    "smollm2": {"default_system": SMOL},
    "qwen2.5": {"default_system": QWEN},
    "qwen3": {},
    "llama3": {},
    "gemma2": FOLDS | MERGES,
    "gemma3": MERGES,
    "mistral1": FOLDS | MERGES,
    "mistral3": MERGES,
    "r1_distill": {"opens": "<think>"},
    "phi3": FOLDS,
    "begins_twice": {"doubled_begin": "<|begin_of_text|>"},
    "strips_thinking": {"lost_blocks": ("thinking",)},
}
CHAIN = format_chain("Hm.", "{}", "DA", "So.")


CHAIN_LEFT, BOS = CHAIN.partition("</thinking>\n")[2], 0


def turns(*said):
    """user, assistant, user, ... of these texts."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


SYSTEM = {"role": "system", "content": "Play the game."}
ANSWERED_FIRST = [SYSTEM, *turns("", "What is it?", "Why?")[1:]]
TALKS = {
    "question": turns("Why?"),
    "history": turns("Why?", CHAIN, "And how?"),
    "instructed": [SYSTEM, *turns("Why?")],
    "instructed_history": [SYSTEM, *turns("Why?", CHAIN, "And how?")],
    "repeated": [*turns("Why?"), *turns("Please?")],
    "repeated_answers": [*turns("Why?", "So."), *turns("?", CHAIN)[1:], *turns("And how?")],
}


@pytest.fixture(scope="module")
def engines(llama3_folder):
    """Template name → an engine of the tiny Llama with it, whose tokenizer begins texts with BOS itself."""
    engine = folder_engine(llama3_folder)
    return {name: with_template(engine, text) for name, text in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_does_is_found_by_asking_it(engines, name):
    assert engines[name].template == Template(**FOUND[name])
    assert len(list(peculiarities(engines[name].template))) == len(FOUND[name])


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_that_was_said_is_lost_and_what_transformers_writes_stays(engines, name, talk):
    engine, messages = engines[name], TALKS[talk]
    ids = engine_lib.encode(engine, messages)
    text, lost = engine.tokenizer.decode(ids), engine.template.lost_blocks
    said = [CHAIN_LEFT if lost and m["content"] == CHAIN else m["content"] for m in messages]
    assert [part for part in said if part not in text] == []
    assert ids.count(BOS) == ids[:2].count(BOS) == TEMPLATES[name].count("bos_token")
    refused = "instructed" in talk and not engine.template.takes_system
    if not refused and not ("repeated" in talk and not engine.template.takes_repeats):
        theirs = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == theirs["input_ids"]


@pytest.mark.parametrize("name", ["gemma2", "mistral1"])
def test_what_a_template_refuses_is_put_as_it_takes_it(engines, name):
    engine, both = engines[name], "Play the game.\n\nWhy?"
    assert engine_lib.encode(engine, TALKS["instructed"]) == engine_lib.encode(engine, turns(both))
    merged = engine_lib.encode(engine, TALKS["repeated"])
    assert merged == engine_lib.encode(engine, turns("Why?\n\nPlease?"))
    first = engine_lib.encode(engine, ANSWERED_FIRST)
    assert first == engine_lib.encode(engine, turns("Play the game.", "What is it?", "Why?"))


@pytest.mark.parametrize(("name", "messages"), [("gemma2", ANSWERED_FIRST[1:]), ("gemma3", ANSWERED_FIRST)])
def test_what_no_rewriting_mends_is_refused_in_one_line(engines, name, messages):
    with pytest.raises(UserError, match="the chat template refuses these messages .*roles must alternate"):
        engine_lib.encode(engines[name], messages)


@pytest.mark.parametrize("talk", TALKS)
def test_gemma_2_is_written_as_gemma_3_writes_it(engines, talk):
    ours, theirs = (engine_lib.encode(engines[name], TALKS[talk]) for name in ("gemma2", "gemma3"))
    assert ours == theirs


def test_messages_alone_are_left_as_they_are():
    assert fitted(TALKS["repeated"], Template()) is TALKS["repeated"]
    assert fitted([SYSTEM], Template(takes_system=False)) == [{"role": "user", "content": "Play the game."}]


def test_a_folders_engine_has_asked_its_template(llama3_folder):
    assert folder_engine(llama3_folder).template == Template()


def test_a_run_from_a_folder_whose_template_takes_no_system_message_says_so(llama3_folder, tmp_path, caplog):
    folder = shutil.copytree(llama3_folder, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(TEMPLATES["gemma2"])
    config = quickstart.get_config("tiny")
    config.start.path, config.max_new_tokens = str(folder), 2048
    config.buckets.prompt, config.buckets.completion = (1024,), (2048,)
    config.data.update(train_per_task=4, test_per_task=1, tasks=("math",))
    with caplog.at_level(logging.WARNING):
        job = make_job(config, tmp_path / "run")
    assert f"{folder}: the chat template takes no system message: the instruction opens" in caplog.text
    for item, tokens in zip(job.train.items, job.train.tokens, strict=True):
        asked = f"<start_of_turn>user\nPlay the game, then respond.\n\n{item.intent}<end_of_turn>\n"
        text = f"<|begin_of_text|>{asked}<start_of_turn>model\n"
        assert job.engine.tokenizer.decode(tokens) == text
    assert [row.prompt for row in job.demonstrations] == job.train.tokens


def test_rows_that_a_template_refuses_end_a_run_and_are_listed_by_the_report(llama3_folder, tmp_path):
    folder = shutil.copytree(llama3_folder, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(TEMPLATES["gemma3"])
    rows = [TALKS["history"], ANSWERED_FIRST[1:], TALKS["question"]]
    lines = [json.dumps({"messages": row, "truth": "1"}) + "\n" for row in rows]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    config = quickstart.get_config("tiny")
    config.start.path, config.sft.steps, config.buckets.prompt = str(folder), 0, (1024,)
    config.data.update(source=f"jsonl:{tmp_path}", tasks=("math",), train_per_task=0, test_per_task=0)
    line = f"{tmp_path}/test.jsonl:2: the chat template refuses these messages"
    with pytest.raises(UserError, match=rf"^{line} .*mend the row, or set config.data.history=flat$"):
        make_job(config, tmp_path / "run")
    found = describe_data(make_settings(config))
    assert found["tasks"]["math"]["splits"]["test"]["rows"] == 2
    assert found["bad"]["rows"] == 2 and found["bad"]["lines"][1].startswith(line)
    config.data.history = "flat"
    assert describe_data(make_settings(config))["bad"]["rows"] == 0
    assert len(make_job(config, tmp_path / "run").test.items) == 3


@pytest.mark.parametrize("main", [generate.main, steer.main])
def test_a_prompt_that_no_bucket_holds_is_named_before_any_is_written(llama3_folder, tmp_path, capsys, main):
    prompts, out = tmp_path / "P.jsonl", tmp_path / "O.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n{"prompt": "' + "Why?" * 3000 + '"}\n')
    with pytest.raises(SystemExit) as stop:
        main([f"--model={llama3_folder}", f"--prompts={prompts}", f"--out={out}", "--batch_size=1"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and not out.exists()
    assert re.match(rf"error: {prompts}:2: 12\d\d\d tokens; a prompt holds 1 to 8192$", line)
