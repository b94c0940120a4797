"""Texts begin once and turns end with the token that the chat template says, whatever the folder lists."""

import copy
import dataclasses
import datetime
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import quickstart
from gtalign_jax.errors import UserError
from gtalign_jax.rollout import chat, generate
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.folder import (
    EngineOptions,
    folder_engine,
    generation_fields,
    load_engine,
    load_tokenizer,
)
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.run import record
from gtalign_jax.run.job import load_start, make_job, save_model

DAY = datetime.date(2024, 7, 26)
BOS, END_OF_TEXT, EOM, EOT = range(4)
HELLO = [{"role": "user", "content": "the question"}]


@pytest.fixture(scope="module")
def engine(llama3_folder):
    return folder_engine(llama3_folder, EngineOptions(date=DAY), chat=True)


@pytest.fixture
def edited(llama3_folder, tmp_path):
    """edited(name, change): a copy of the folder with a JSON file changed."""
    folder = shutil.copytree(llama3_folder, tmp_path / "edited")

    def edit(name, **changes):
        fields = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in fields.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))
        return folder

    return edit


def test_every_kind_of_prompt_begins_once(engine, llama3_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(llama3_folder)
    plain = engine_lib.encode(engine, "the question")
    assert plain == theirs("the question")["input_ids"] and plain.count(BOS) == 1
    messages = engine_lib.encode(engine, HELLO)
    assert messages[0] == BOS and messages.count(BOS) == 1
    rendered = chat.render(engine.tokenizer, HELLO, DAY)
    assert rendered.startswith("<|begin_of_text|>")
    assert engine_lib.encode(engine, rendered) == messages
    assert engine_lib.encode(engine, "<|begin_of_text|>") == [BOS]
    twice = "<|begin_of_text|><|begin_of_text|>x"  # as it was asked for
    assert engine_lib.encode(engine, twice).count(BOS) == 2


def test_the_token_that_ends_a_turn_is_the_first_end_token(engine, edited):
    assert engine.eos_ids == (EOT, END_OF_TEXT, EOM)
    for ids in (1, [1, 1], [2]):  # a base model's: the template goes on ending turns with its own
        folder = edited("generation_config.json", eos_token_id=ids)
        rest = tuple(dict.fromkeys([ids] if isinstance(ids, int) else ids))
        assert folder_engine(folder, chat=True).eos_ids == (EOT, *rest)
    edited("generation_config.json", eos_token_id=None)
    assert folder_engine(edited("config.json", eos_token_id=2), chat=True).eos_ids == (EOT, EOM)
    assert folder_engine(edited("config.json", eos_token_id=None), chat=True).eos_ids == (EOT,)


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|eot_id|>\n", EOT),
        (" <|end_of_text|>", END_OF_TEXT),
        ("\n\n", None),
        ("", None),
        ("{{ raise_exception('no answers') }}", None),
        ("<|eom_id|><|eot_id|>", EOM),
    ],
)
def test_what_ends_a_turn_is_read_from_the_template(engine, after, end):
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + after + "{% endif %}"
        "{% endfor %}"
    )
    assert chat.turn_end(tokenizer) == end


def test_without_a_template_the_folder_says_what_ends(llama3_folder, tmp_path):
    folder = shutil.copytree(llama3_folder, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    assert folder_engine(folder).eos_ids == (EOT, END_OF_TEXT, EOM)  # the tokenizer's own first
    with pytest.raises(UserError, match="no chat template"):
        engine_lib.encode(folder_engine(folder), HELLO)


def test_an_export_changes_only_what_it_must_of_the_generation_config(engine, llama3_folder, edited):
    fields = json.loads((llama3_folder / "generation_config.json").read_text())
    assert generation_fields(llama3_folder, engine.tokenizer, 384) == fields
    folder = edited("generation_config.json", eos_token_id=1)
    assert generation_fields(folder, engine.tokenizer, 384) == fields | {"eos_token_id": [EOT, END_OF_TEXT]}
    (folder / "generation_config.json").unlink()
    expected = {"eos_token_id": [EOT, END_OF_TEXT, EOM], "pad_token_id": 6}
    assert generation_fields(folder, engine.tokenizer, 384) == expected


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", [384, -1, [1, 384], [[1]], "1", [None], 1.5, True, {}, [1, "2"]])
def test_end_tokens_that_the_model_does_not_have_are_named(edited, name, ids):
    edited("generation_config.json", eos_token_id=None)
    folder = edited(name, eos_token_id=ids)
    with pytest.raises(UserError, match=f"{name}: eos_token_id=.* must be ids of tokens from 0 to 383"):
        folder_engine(folder)


def test_a_date_in_prompts_is_the_engines(engine, llama3_folder):
    text = engine.tokenizer.decode(engine_lib.encode(engine, HELLO))
    assert "Today Date: 26 Jul 2024" in text and chat.asks_for_date(engine.tokenizer)
    today = folder_engine(llama3_folder)
    expected = chat.render(today.tokenizer, HELLO, datetime.date.today())
    assert today.tokenizer.decode(engine_lib.encode(today, HELLO)) == expected


def test_a_template_without_a_date_asks_for_none(tokenizer):
    assert not chat.asks_for_date(tokenizer)
    assert chat.render(tokenizer, HELLO, DAY) == chat.render(tokenizer, HELLO)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "the chat template does not end"),
        ("{% for i in range(10**9) %}{% endfor %}", "the chat template refuses these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses these messages .maximum recursion"),
        ("{% for", "the chat template refuses these messages"),
        ("{{ 1 / 0 }}", r"refuses these messages \(division by zero\)"),
        ("{{ messages[3].content }}", "the chat template refuses these messages"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses these messages"),
        ("{{ raise_exception('never') }}", r"refuses these messages \(never\)"),
        ("Hi", "the chat template leaves a message out"),
        ("{{ ''.__class__.__mro__ }}", "the chat template"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_one_line(llama3_folder, tmp_path, template, message):
    folder = shutil.copytree(llama3_folder, tmp_path / "template")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"{folder}: .*{message}.*mend chat_template.jinja") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_padded_vocabulary_and_several_ends_generate_as_in_pytorch(engine, llama3_folder):
    """Also tokens that have no text; the random model meets end tokens of all kinds where it is made to."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama3_folder, dtype=torch.float32)
    known = len(engine.tokenizer)
    assert known < 384 and engine_lib.decode_tokens(engine, [383, known, EOT]) == ""
    buckets = BucketConfig(prompt=(8,), completion=(24,), batch=(4,))
    ours, params = load_engine(str(llama3_folder), EngineOptions(sampling=GREEDY, buckets=buckets))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(7, 384, 6).tolist() for _ in range(4)]
    ends = tuple(range(0, 384, 16)) + ours.eos_ids
    ours = dataclasses.replace(ours, eos_ids=ends)
    request = Request(engine_lib.prompt_batch(ours, prompts), jax.random.key(0), 1, 24)
    rows = engine_lib.completion_ids(generate.rollout(ours, params, request).completions)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=list(ends)
        )
        assert row.tolist() == expected[0, len(prompt) :].tolist()
    assert any(row[-1] in ends for row in rows) and any(i >= known for row in rows for i in row)


@pytest.fixture
def job(llama3_folder, tmp_path):
    """job() makes the job of a short cold start from the folder, in one workdir."""
    config = quickstart.get_config("tiny")
    config.start.path = str(llama3_folder)
    config.max_new_tokens = 2048
    config.buckets.prompt, config.buckets.completion = (1024,), (2048,)
    return lambda: make_job(config, tmp_path)


def test_demonstrations_from_such_a_folder_begin_and_end_as_turns_do(job):
    made = job()
    tokenizer = made.engine.tokenizer
    assert made.demonstrations
    for demonstration in made.demonstrations:
        assert demonstration.prompt[0] == BOS and demonstration.prompt.count(BOS) == 1
        for row in demonstration.completions:
            assert row[-1] == EOT and not {BOS, END_OF_TEXT, EOM, EOT} & set(row[:-1])
            text = tokenizer.decode(row[:-1])
            assert text.startswith("<thinking>") and text.endswith("</response>")


def test_the_export_of_such_a_run_keeps_the_folders_settings(job, llama3_folder, tmp_path):
    made = job()
    save_model(load_start(made), made.model, tmp_path / "hf", made.engine.tokenizer, made.model_folder)
    for name in ("generation_config.json", "config.json"):
        before, after = (json.loads((f / name).read_text()) for f in (llama3_folder, tmp_path / "hf"))
        assert before == after, name
    again = folder_engine(tmp_path / "hf", EngineOptions(date=DAY))
    first = folder_engine(llama3_folder, EngineOptions(date=DAY))
    assert again.eos_ids == first.eos_ids
    for prompt in ("the payoff", HELLO):
        assert engine_lib.encode(again, prompt) == engine_lib.encode(first, prompt)


def test_a_run_that_goes_on_after_midnight_has_the_same_prompts(job, tmp_path, monkeypatch):
    class Day(datetime.date):
        today = classmethod(lambda cls: cls(2026, 1, 31))

    monkeypatch.setattr(record.datetime, "date", Day)
    before = job()
    assert (tmp_path / "date.txt").read_text() == "2026-01-31\n"
    assert "31 Jan 2026" in before.engine.tokenizer.decode(before.train.tokens[0])
    monkeypatch.setattr(Day, "today", classmethod(lambda cls: cls(2026, 2, 1)))
    after = job()
    assert (after.train, after.test) == (before.train, before.test)
    (tmp_path / "date.txt").write_text("yesterday")
    with pytest.raises(UserError, match="date.txt: must be the day the run was started on"):
        job()
