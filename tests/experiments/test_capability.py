"""lm-eval on a served folder: the same numbers as on PyTorch, before and after in a table, refusals."""

import json
import re
import signal
import socket
import subprocess
import sys
import types
from collections import Counter

import jax
import numpy as np
import pytest

from experiments import capability
from experiments.standard_tasks import questions
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.models import hf
from gtalign_jax.models.transformer import init_params
from tests.small import small_model

LIMIT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    asked = questions.schoolbook()["test"]
    tokenizer = train_tokenizer([one["question"] for one in asked] * 2, 400)
    config = small_model(len(tokenizer))
    hf.save_params(init_params(jax.random.key(0), config), config, path)
    tokenizer.save_pretrained(path)
    return path


def report(**metrics):
    """lm-eval's report of one task whose questions are worth these values."""
    means = {f"{metric},none": float(np.mean(values)) for metric, values in metrics.items()}
    samples = [
        {"doc_id": i, "filter": "none", "metrics": [*metrics], **dict(zip(metrics, row, strict=True))}
        for i, row in enumerate(zip(*metrics.values(), strict=True))
    ]
    return {"results": {"facts": {"alias": "facts", **means}}, "samples": {"facts": samples}}


def test_served_texts_are_worth_what_they_are_on_pytorch(folder):
    lm_eval = pytest.importorskip(
        "lm_eval", reason='pip install "gtalign-jax[eval]" for standard evaluations'
    )
    flags = capability.parse_flags([f"--model={folder}", f"--limit={LIMIT}", "--max_tokens=96"])
    manager = capability.open_tasks(flags)
    served = capability.evaluate(str(folder), flags, manager)
    peer = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        device="cpu",
        tasks=["schoolbook"],
        task_manager=manager,
        limit=LIMIT,
        bootstrap_iters=0,
    )
    ours, theirs = (
        [sample["filtered_resps"] for sample in found["samples"]["schoolbook"]] for found in (served, peer)
    )
    assert np.shape(ours) == (LIMIT, questions.OPTIONS, 2)
    np.testing.assert_allclose(np.array(ours)[..., 0], np.array(theirs)[..., 0], atol=1e-3)
    assert [[greedy for _, greedy in one] for one in ours] == [
        [greedy for _, greedy in one] for one in theirs
    ]
    (((task, metric), values),) = capability.scores(served).items()
    assert (task, metric, len(values)) == ("schoolbook", "acc", LIMIT)


def test_before_and_after_stand_in_one_table_with_the_change(folder, tmp_path, monkeypatch, capsys):
    right = {"a": [0.0] * 20 + [1.0] * 20, "b": [1.0] * 40}
    monkeypatch.setattr(capability, "open_tasks", lambda flags: None)
    monkeypatch.setattr(capability, "evaluate", lambda name, *_: report(acc=right[name[-1]]))
    for name in right:
        (tmp_path / name).symlink_to(folder)
    out = tmp_path / "found.json"
    capability.main([f"--before={tmp_path / 'a'}", f"--model={tmp_path / 'b'}", f"--out={out}"])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "n", "before", "model", "change"]
    assert line.startswith("facts  acc     40  0.500 [0.")
    assert "1.000 [1.000, 1.000]  +0.500 [+0." in line and line.endswith(" *")
    found = json.loads(out.read_text())
    (row,) = found["table"]
    assert row["change"]["n"] == 40 and row["change"]["p"] < 0.01
    assert found["lm_eval"]["before"]["facts"]["acc,none"] == 0.5
    capability.main([f"--model={tmp_path / 'b'}"])
    assert capsys.readouterr().out.splitlines()[0].split() == ["task", "metric", "n", "model"]


def test_a_metric_that_is_no_mean_over_questions_is_left_to_lm_eval():
    found = report(acc=[0.0, 1.0], f1=[0.0, 1.0])
    found["results"]["facts"]["f1,none"] = 0.7  # of all questions together
    found["samples"]["facts"][0]["acc_norm"] = 1.0
    assert capability.scores(found) == {("facts", "acc"): {0: 0.0, 1: 1.0}}


def test_questions_have_one_right_answer_of_four_at_any_place():
    asked = questions.schoolbook()["test"]
    assert len(asked) == len({one["question"] for one in asked}) == 100
    assert all(len(set(one["choices"])) == questions.OPTIONS for one in asked)
    places = Counter(one["answer"] for one in asked)
    assert sorted(places) == [0, 1, 2, 3] and max(places.values()) <= 35
    again = questions.schoolbook()["test"]
    assert asked.to_list() == again.to_list()
    known = {one["question"]: one["choices"][one["answer"]] for one in asked}
    assert known["What is the capital of Peru?"] == "Lima"
    assert known["Which month comes right after December?"] == "January"
    for question, answer in known.items():
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if "finds" in question:
            assert int(answer) == sum(numbers)
        elif numbers:
            assert int(answer) - numbers[-1] == numbers[1] - numbers[0]


@pytest.mark.parametrize(
    ("answer", "worth"),
    [("Ann has 12 coins.", 1), ("3 + 9 = 12", 1), ("12 or 13", 0), ("none", 0), ("", 0)],
)
@pytest.mark.parametrize("before", ["", "<payoff>7 8</payoff><response>\n"])
def test_the_last_number_of_an_answer_is_marked(answer, worth, before):
    assert questions.last_number({"answer": "12"}, [before + answer]) == {"acc": float(worth)}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model=nowhere"], "--model=nowhere: no config.json there"),
        (["--before=nowhere"], "--before=nowhere: no config.json there"),
        (["--limit=0"], "--limit=0: must be at least 1"),
        (["--max_tokens=0"], "--max_tokens=0: must be at least 1"),
        (["--system=Be kind."], "--system: needs --chat"),
        (["--include=nowhere"], "--include=nowhere: no such folder"),
        (["--tasks=schoolbok"], "--tasks=schoolbok: no such task; the nearest: schoolbook"),
        (["--out=/dev/null/there.json"], "/dev/null/there.json: cannot write there"),
    ],
)
def test_what_cannot_be_is_one_line(refused, folder, flags, said):
    if flags[0].startswith("--tasks"):
        pytest.importorskip("lm_eval", reason='pip install "gtalign-jax[eval]" for standard evaluations')
    assert said in refused(capability.main, [f"--model={folder}", *flags])


class Refusal(OSError):
    response = types.SimpleNamespace(text='{"error": {"message":\n"max_tokens=320: too many"}}')


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (
            RuntimeError("python did not start: compiling\nerror: config.json: no model"),
            ": config.json: no model",
        ),
        (Refusal("400 Bad Request"), '400 Bad Request {"error": {"message": "max_tokens=320: too many"}}'),
        (ConnectionError("Couldn't reach\n'allenai/ai2_arc'"), ": Couldn't reach 'allenai/ai2_arc'"),
    ],
)
def test_a_server_or_hub_that_fails_says_why_in_a_line(refused, folder, monkeypatch, fails, said):
    def fail(*_):
        raise fails

    pytest.importorskip("lm_eval", reason='pip install "gtalign-jax[eval]" for standard evaluations')
    monkeypatch.setattr(capability, "open_tasks", lambda flags: None)
    monkeypatch.setattr(capability.servers, "ours", fail)
    assert said in refused(capability.main, [f"--model={folder}"])


def test_without_lm_eval_the_extra_is_named(refused, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert 'pip install "gtalign-jax[eval]"' in refused(capability.main, [f"--model={folder}"])


SCRIPT = """
import sys, time
from experiments.peers.servers import free_port, opened

port = free_port()
command = [sys.executable, "-m", "http.server", str(port), "--directory", sys.argv[1], "--bind", "127.0.0.1"]
with opened(command, port):
    print(port, flush=True)
    time.sleep(60)  # until it is stopped
"""


def test_a_served_model_ends_with_the_command_that_is_stopped(tmp_path):
    (tmp_path / "health").write_text("ok")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        socket.create_connection(("127.0.0.1", port)).close()
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
