"""Generation from a Hugging Face folder is what PyTorch transformers generates from it."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

from experiments import generate, logprobs, steer
from gtalign_jax.chain.parse import parse_chain
from gtalign_jax.errors import UserError
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import lines
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.folder import load_engine, load_tokenizer
from gtalign_jax.rollout.grammar import read_limits


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random Qwen2 whose weights are large enough for varied greedy text."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=434,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def generated(folder, tmp_path_factory):
    """Greedy lines of 64 tokens for one prompt of each kind and length."""
    home = tmp_path_factory.mktemp("generated")
    rng = np.random.default_rng(0)
    prompts = [
        {"id": "text", "prompt": "a clear question"},
        {"messages": [{"role": "user", "content": "the payoff"}]},
        *({"token_ids": rng.integers(2, 300, n).tolist()} for n in (1, 3, 9, 30)),
    ]
    source = _write(home / "prompts.jsonl", prompts)
    generate.main(
        [
            f"--model={folder}",
            f"--prompts={source}",
            f"--out={home / 'out.jsonl'}",
            "--temperature=0",
            "--max_new_tokens=64",
            "--logprobs",
            "--batch_size=4",
        ]
    )
    return prompts, _read(home / "out.jsonl")


def test_greedy_generation_is_that_of_pytorch(folder, model, generated):
    engine, _ = load_engine(str(folder))
    prompts, out = generated
    assert [line["id"] for line in out] == ["text", 1, 2, 3, 4, 5]
    for number, (prompt, line) in enumerate(zip(prompts, out, strict=True)):
        ids = lines.prompt_ids(engine, {**prompt, "line": number}, "prompts")
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=64,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        assert line["token_ids"] == expected
        assert line["text"] == engine_lib.decode_tokens(engine, expected)
        assert line["finished"] == (expected[-1] in engine.eos_ids)


def test_logprobs_of_both_commands_are_those_of_pytorch(folder, model, generated, tmp_path):
    engine, _ = load_engine(str(folder))
    prompts, out = generated
    rows = [
        lines.prompt_ids(engine, {**prompt, "line": 0}, "prompts") + line["token_ids"]
        for prompt, line in zip(prompts, out, strict=True)
    ]
    source = _write(tmp_path / "rows.jsonl", [{"token_ids": row} for row in rows])
    logprobs.main([f"--model={folder}", f"--tokens={source}", f"--out={tmp_path / 'out.jsonl'}"])
    for row, scored, line in zip(rows, _read(tmp_path / "out.jsonl"), out, strict=True):
        with torch.no_grad():
            logits = torch.log_softmax(model(torch.tensor([row])).logits[0], -1).numpy()
        expected = logits[np.arange(len(row) - 1), row[1:]]
        assert len(scored["logprobs"]) == len(row) - 1
        np.testing.assert_allclose(scored["logprobs"], expected, atol=2e-5)
        np.testing.assert_allclose(line["logprobs"], expected[-len(line["token_ids"]) :], atol=2e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "give one of prompt, messages, token_ids"),
        ({"prompt": "x", "token_ids": [1]}, "give one of"),
        ({"token_ids": [1, 304]}, r"integers in \[0, 304\)"),
        ({"messages": [{"content": "x"}]}, "role and content"),
        ({"prompt": 3}, "prompt must be a string"),
    ],
)
def test_a_bad_prompt_line_is_named(tokenizer, row, message):
    engine = Engine(tokenizer, ModelConfig(vocab_size=304), (tokenizer.eos_token_id,))
    with pytest.raises(UserError, match=f"p.jsonl:7: .*{message}"):
        lines.prompt_ids(engine, {**row, "line": 7}, "p.jsonl")


def test_bad_files_end_with_one_line_and_status_two(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    for prompts, message in ((tmp_path / "bad.jsonl", "bad.jsonl:2: not JSON"), (tmp_path, "cannot be read")):
        with pytest.raises(SystemExit) as end:
            generate.main([f"--model={tmp_path}", f"--prompts={prompts}", f"--out={tmp_path / 'o'}"])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_what_a_tokenizer_lacks_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer .*; save one with save_pretrained") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    for field, message in (("chat_template", "no chat template"), ("eos_token", "no end token")):
        poor, folder = copy.deepcopy(tokenizer), tmp_path / field
        setattr(poor, field, None)
        poor.save_pretrained(folder)
        assert len(load_tokenizer(folder)) == len(tokenizer)
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder, chat=True)


def test_a_failed_run_leaves_the_old_output(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    source = _write(tmp_path / "p.jsonl", [{"prompt": "x"}, {"token_ids": [450]}])
    with pytest.raises(SystemExit):
        generate.main([f"--model={folder}", f"--prompts={source}", f"--out={out}"])
    assert out.read_text() == "old" and "p.jsonl:2: token_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "line"),
    [
        (generate, "--top_p=0", "error: --top_p=0.0: must be in (0, 1]\n"),
        (generate, "--temperature=-1", "error: --temperature=-1.0: must be 0 (greedy) or positive\n"),
        (steer, "--temperature=-1", "error: --temperature=-1.0: must be 0 (greedy) or positive\n"),
    ],
)
def test_a_sampling_flag_out_of_range_is_one_line_that_names_it(capsys, command, flag, line):
    rest = ["--prompt=x"] if command is steer else ["--prompts=x", "--out=x"]
    with pytest.raises(SystemExit):
        command.main(["--model=x", *rest, flag])
    assert capsys.readouterr().err == line


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n', encoding="utf-8")
    assert [(line["line"], line["prompt"]) for line in lines.read_lines(str(path))] == [
        (1, "a\u2028b"),
        (3, "c"),
    ]


@pytest.mark.parametrize("tries", [[], ["--unusable=grammar"]])
def test_under_the_grammar_a_random_model_can_be_steered(folder, capsys, tries):
    limits = {"thinking": 20, "payoff": 30, "analyze": 20}
    text = ",".join(f"{name}={value}" for name, value in limits.items())
    flags = [f"--model={folder}", "--prompt=the payoff", "--max_new_tokens=560", "--price=1", "--json"]
    steer.main([*flags, f"--grammar={text}", *tries])
    line = json.loads(capsys.readouterr().out)
    before, after = (parse_chain(line[name]["text"]) for name in ("before", "after"))
    assert before.format_ok and before.reward_ok and after.format_ok and after.reward_ok
    assert before.payoff != after.payoff


def test_a_matrix_that_cannot_be_read_is_what_the_flag_says(folder, capsys):
    flags = [f"--model={folder}", "--prompt=the payoff", "--max_new_tokens=24", "--json", "--temperature=1"]
    written = {}
    for unusable in ("unsteered", "again"):
        steer.main([*flags, f"--unusable={unusable}"])
        line = json.loads(capsys.readouterr().out)
        assert line["after"] is None and "no usable matrix" in line["failure"]
        written[unusable] = line["before"]["text"]
    assert written["unsteered"] != written["again"]
    with pytest.raises(SystemExit) as stop:
        steer.main(flags)
    assert stop.value.code == 2 and "error: the model wrote no usable matrix" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["thinking", "thinking=-1", "thinking=x", "mind=3", "thinking=5 payoff=3"])
def test_limits_that_cannot_be_read_are_named(text):
    with pytest.raises(UserError, match="write BLOCK=TOKENS,... with blocks thinking, payoff"):
        read_limits(text)


def test_under_the_grammar_a_random_model_writes_valid_chains(folder, tmp_path):
    source = _write(tmp_path / "prompts.jsonl", [{"prompt": "a clear question"}, {"prompt": "the payoff"}])
    flags = [f"--model={folder}", f"--prompts={source}", f"--out={tmp_path / 'out.jsonl'}"]
    generate.main([*flags, "--max_new_tokens=420", "--n=2", "--grammar"])
    rows = _read(tmp_path / "out.jsonl")
    assert len(rows) == 4
    for row in rows:
        chain = parse_chain(row["text"])
        assert chain.format_ok and chain.reward_ok and row["finished"], chain.errors
