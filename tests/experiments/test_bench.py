"""The benchmarks' own arithmetic: work counted, rounds timed, peers talked to, tables written."""

import argparse
import functools
import gc
import itertools
import json
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench_common as common
from experiments import bench_limits as limits
from experiments import bench_profile, bench_rollout, bench_step, bench_table, bench_train
from experiments.bench_common import Workload
from experiments.peers import launch, torch_train
from gtalign_jax.errors import UserError
from gtalign_jax.learning import microbatches
from gtalign_jax.planning import hlo


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """`main` stays in this process."""
    monkeypatch.setenv("BENCH_STARTED", "1")


def lines_of(capsys, main, *argv):
    main(list(argv))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- work ---------------------------------------------------------------------------------------------


def counted_flops(fields, rows, slots, kept):
    """Matrix-product FLOPs of forward and backward in PyTorch, attention over all pairs of positions."""
    config = transformers.Qwen2Config(**fields, attn_implementation="eager")
    model = transformers.Qwen2ForCausalLM(config)
    tokens = torch.zeros((rows, slots), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits
        out.sum().backward()
    return counter.get_total_flops()


def unseen(fields, rows, slots):
    """What of it goes into pairs that causality hides: forward and backward."""
    return 3 * 4 * fields["num_hidden_layers"] * fields["hidden_size"] * rows * slots * (slots - 1) / 2


def unread(fields, rows, slots):
    """What it computes of prompts in the last layer unread: all but keys, values, a token."""
    layer = meta_model(fields).model.layers[-1].named_parameters()
    weights = sum(
        p.numel() for name, p in layer if p.ndim > 1 and not name.endswith(("k_proj.weight", "v_proj.weight"))
    )
    pairs = slots * (slots - 1) / 2
    return 3 * rows * (2 * weights * (slots - 1) + 4 * fields["hidden_size"] * pairs)


def test_flops_of_separate_rows_are_pytorchs():
    fields, size = common.SHAPES["tiny"], Workload(prompts=2, group=3, slots=5, new=7)
    expected = counted_flops(fields, 6, 12, 7) - unseen(fields, 6, 12) - unread(fields, 6, 5)
    assert limits.step_flops(fields, size, shared=False) == pytest.approx(expected, rel=1e-6)


def test_sharing_saves_the_prompts_other_copies():
    fields, size = common.SHAPES["tiny"], Workload(prompts=2, group=3, slots=5, new=7)
    saved = limits.step_flops(fields, size, shared=False) - limits.step_flops(fields, size, shared=True)
    one = counted_flops(fields, 1, 5, 1) - unseen(fields, 1, 5) - unread(fields, 1, 5)
    logits = 3 * 2 * fields["vocab_size"] * fields["hidden_size"]
    assert saved == pytest.approx(4 * (one - logits), rel=1e-6)


def test_a_decode_step_is_bound_by_reading_or_by_multiplying(monkeypatch):
    fields = common.SHAPES["small"]
    weights = sum(p.numel() for p in meta_model(fields).parameters() if p.ndim > 1)
    monkeypatch.setattr(common, "machine", lambda dtype: (1e30, 1e9))
    assert limits.decode_seconds(fields, 32, "float32") == pytest.approx(4 * weights / 1e9)
    assert limits.decode_seconds(fields, 32, "bfloat16") == pytest.approx(2 * weights / 1e9)
    monkeypatch.setattr(common, "machine", lambda dtype: (1e9, 1e30))
    assert limits.decode_seconds(fields, 32, "float32") == pytest.approx(2 * weights * 32 / 1e9)


def meta_model(fields):
    with torch.device("meta"):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields))


# --- time ---------------------------------------------------------------------------------------------


def test_rounds_alternate_and_those_in_which_memory_grows_are_not_counted(monkeypatch):
    order, now = [], [0.0]

    def make(name, cost):
        def run():
            order.append(name)
            now[0] += cost * order.count(name)

        return lambda: run

    # Before the two rounds that warm up; before and after the others, of which the second grows.
    held = iter([100, 200, 200, 200, 200, 300, 300, 301])
    monkeypatch.setattr(common, "resident_bytes", lambda: next(held))
    makes = {"a": make("a", 1.0), "b": make("b", 2.0)}
    seconds = common.time_rounds(2, makes, clock=lambda: now[0])
    assert order == ["a", "b"] * (common.WARM_UP + 3)
    assert seconds == {"a": [3.0, 5.0], "b": [6.0, 10.0]}


def test_a_contender_that_never_stops_growing_is_measured_nevertheless(monkeypatch):
    held, rounds = itertools.count(1), []
    monkeypatch.setattr(common, "resident_bytes", lambda: 2 ** next(held))
    seconds = common.time_rounds(2, {"a": lambda: lambda: rounds.append("a")})
    assert len(seconds["a"]) == 2 and len(rounds) == common.WARM_UP + 2 + common.SPARE


def test_each_of_several_measurements_has_a_process_of_its_own(capsys):
    flags = argparse.Namespace(
        case="", repeats=1, device="cpu", shape="tiny", dtype="float32", allocator="tuned"
    )
    own = functools.partial(eval, "[{'case': 'own', 'id': __import__('os').getpid()}]", {})
    common.run_cases("x", flags, {"one": [own], "two": [own], "three": [own]}, named_only=("three",))
    ids = [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]
    assert len({*ids, os.getpid()}) == 3


def test_memory_counts_the_processes_that_were_started(tmp_path):
    alone = common.resident_bytes()
    body = "import sys; kept = bytearray(b'x' * 2**28); print(flush=True); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", body], **pipes) as process:
        process.stdout.readline()
        assert common.resident_bytes() > alone + 2**27
        process.communicate(b"done\n")


def test_one_after_the_other_each_is_dropped_before_the_next_is_made():
    alive = []

    class Run:
        def __call__(self):
            pass

    def make():
        gc.collect()
        assert all(ref() is None for ref in alive)
        run = Run()
        alive.append(weakref.ref(run))
        return run

    seconds = common.time_rounds(1, {"a": make, "b": make}, together=False)
    assert len(alive) == 2 and {name: len(taken) for name, taken in seconds.items()} == {"a": 1, "b": 1}


def test_rates_are_of_medians():
    line = common.compare([1.0, 9.0, 2.0], [3.0, 4.0, 99.0], tokens=100)
    assert (line["ours"], line["peer"], line["ratio"]) == (50.0, 25.0, 2.0)


# --- peers --------------------------------------------------------------------------------------------


def test_texts_read_back_as_their_tokens_and_differ_in_words():
    tokenizer = launch.make_tokenizer(512)
    tokens = common.random_tokens((8, 64), 512)
    texts = tokenizer.batch_decode(tokens)
    np.testing.assert_array_equal(tokenizer(texts)["input_ids"], tokens)
    assert len({len(text.split()) for text in texts}) > 1


def peer_of(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(launch.HERE)!r})\nfrom rounds import *\n{body}")
    return launch.Peer(str(script), pathlib.Path(sys.executable), {"tokens": 5})


def test_a_peer_answers_each_round_whatever_it_prints(tmp_path):
    body = "spec, rounds = read_spec(), Rounds()\nfor i in range(9):\n"
    body += " rounds.wait(); print('noise'); rounds.done(tokens=spec['tokens'] + i)\n"
    peer = peer_of(tmp_path, body)
    assert [peer()["tokens"], peer()["tokens"]] == [5, 6]
    peer.close()
    assert peer._process.returncode == 0


def test_a_peer_that_ends_is_an_error(tmp_path):
    peer = peer_of(tmp_path, "sys.exit(3)\n")
    with pytest.raises(RuntimeError, match="status 3"):
        peer()
    peer.close()


def test_a_round_with_too_few_tokens_is_an_error():
    launch.check_written(4000, Workload())  # an end token drawn by chance is no error
    with pytest.raises(RuntimeError, match="3000"):
        launch.check_written(3000, Workload())


def test_a_profile_tells_products_from_the_rest():
    a = np.ones((256, 256), np.float32)
    program = jax.jit(lambda x: jnp.sort(jnp.sin(x @ x), axis=0)).lower(a).compile()
    module = hlo.parse(program.as_text())
    named = bench_profile.products(module)
    lines = [line for lines in module.computations.values() for line in lines.values()]
    assert not any(line.name in named for line in lines if line.opcode == "sort")
    assert any(line.opcode == "dot" and line.name in named for line in lines)
    line = bench_profile.profile(program.as_text(), lambda: jax.block_until_ready(program(a)))
    assert line["ours"] > 0 and line["products"] >= 0 and sum(line["most"].values()) > 0


# --- the scripts --------------------------------------------------------------------------------------


def test_training_compares_like_with_like(capsys, monkeypatch):
    """The script itself refuses contenders whose first losses differ."""
    monkeypatch.setattr(common, "in_own_process", lambda measure: measure())  # two interpreters fewer
    shared, rows = lines_of(capsys, bench_train.main, "--shape=tiny", "--case=W", "--repeats=1")
    assert (shared["variant"], rows["variant"]) == ("shared", "rows")
    for line in (shared, rows):
        assert line["ours"] > 0 < line["peer"]
        assert line["share"] == pytest.approx(line["ours"] / line["limit"], abs=1e-3)
    fields, size = common.SHAPES["tiny"], common.workload("W", "tiny")
    assert limits.step_flops(fields, size, shared=True) < limits.step_flops(fields, size, shared=False)


@pytest.mark.parametrize("case", ["ragged", "pack"])
def test_padding_left_out_is_measured_on_the_same_tokens(capsys, monkeypatch, case):
    """The script itself refuses contenders whose first losses differ."""
    monkeypatch.setattr(microbatches, "STEPS", (1.0, 0.5))  # two programs to compile
    (line,) = lines_of(capsys, bench_train.main, "--shape=tiny", f"--case={case}", "--repeats=1")
    ours, padded = (int(words.split()[0]) for words in line["variant"].split(" of "))
    assert 0 < line["tokens"] <= ours <= padded and line["ours"] > 0 < line["peer"]
    assert f"| {case} | {line['variant']} | ours, padded |" in bench_table.render([line])


def test_different_losses_are_refused():
    with pytest.raises(RuntimeError, match="differ"):
        bench_train.check_losses({"shared": 6.0, "rows": 6.0, "peer": 6.1}, "float32")


def test_the_clipped_loss_has_the_policy_gradient():
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss = torch_train.clipped_loss(logp, torch.tensor([[3.0]]), 0.2, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-3.0) and logp.grad.tolist() == [[-1.5, -1.5]]


def test_separate_rows_are_the_same_sequences():
    tokens = bench_train.make_tokens(Workload(prompts=2, group=3, slots=4, new=5), 100)
    rows = tokens.separate()
    assert rows.prompt.shape == (6, 4) and rows.completion.shape == (6, 1, 5)
    for p in range(2):
        for g in range(3):
            np.testing.assert_array_equal(rows.prompt[3 * p + g], tokens.prompt[p])
            np.testing.assert_array_equal(rows.completion[3 * p + g, 0], tokens.completion[p, g])
            assert rows.advantage[3 * p + g, 0] == tokens.advantage[p, g]


def test_rollout_and_memory_lines(capsys):
    (line,) = lines_of(capsys, bench_rollout.main, "--shape=tiny", "--case=W", "--repeats=1", "--peers=")
    assert line["peer_name"] == "transformers" and line["ours"] > 0 < line["peer"]
    (line,) = lines_of(capsys, bench_rollout.main, "--shape=tiny", "--case=smollm2", "--repeats=1", "--vllm=")
    assert line["case"] == "smollm2" and line["peer_name"] is None and line["ours"] > 0
    flags = argparse.Namespace(shape="tiny", dtype="float32", device="cpu", remat="none")
    (memory,) = bench_train.memory("tokens", 1, flags)
    parameters = sum(p.numel() for p in meta_model(common.SHAPES["tiny"]).parameters())
    assert memory["weights"] == round(4 * parameters / 2**20, 1)


def test_a_real_shape_is_measured_at_the_sizes_of_its_case():
    flags = argparse.Namespace(shape="small", dtype="float32")
    other, size = common.real_shape(flags, slots=320, parts=4)
    assert (other.shape, size.rows, size.slots, size.parts) == ("smollm2", 32, 320, 4)
    fields = common.SHAPES["smollm2"]
    assert (fields["model_type"], round(limits.model_weights(fields) / 1e6)) == ("llama", 134)
    assert flags.shape == "small"


def test_a_step_without_peers_and_where_its_seconds_go(capsys):
    argv = ("--shape=tiny", "--case=smollm2", "--repeats=2", "--peers=")
    whole, *parts = lines_of(capsys, bench_step.main, *argv)
    assert whole["peer_name"] is None and whole["ours"] > 0 and whole["peak_mib"]["ours"] > 100
    assert [line["variant"] for line in parts] == ["rollout", "scoring", "update", "host"]
    steps = np.sum([line["seconds"]["ours"] for line in parts], axis=0)
    for seconds in whole["seconds"]["ours"]:  # those of the steps in which memory did not grow
        assert np.abs(steps - seconds).min() < 4e-3  # thousandths, rounded


def test_parts_of_a_step_are_those_of_the_measured_rounds():
    assert common.WARM_UP == 2
    parts = {"scoring": [9.0, 9.0, 1.0, 2.0], "update": [9.0, 9.0, 3.0, 3.0]}
    parts |= {"rollout": [9.0, 9.0, 4.0, 4.0], "step": [30.0, 30.0, 10.0, 12.0]}
    lines = bench_step.part_lines(parts, {"update": 1.5})
    taken = {line["variant"]: line["seconds"]["ours"] for line in lines}
    assert taken == {"rollout": [4.0, 4.0], "scoring": [1.0, 2.0], "update": [3.0, 3.0], "host": [2.0, 3.0]}
    (update,) = (line for line in lines if line["variant"] == "update")
    assert (update["limit"], update["share"]) == (1.5, 0.5)


def test_a_lone_long_answer_costs_the_reading_of_the_weights(monkeypatch):
    monkeypatch.setattr(common, "machine", lambda dtype: (1e30, 1e9))
    flags = argparse.Namespace(shape="tiny", dtype="float32")
    size = Workload(prompts=1, group=4, slots=2, new=10)
    reading = limits.reading_seconds(common.SHAPES["tiny"], "float32")
    plain = 10 * reading * 2  # so a step of all rows costs two readings, and one of two rows one
    least = bench_rollout.least_seconds(np.array([10, 2, 2, 2]), plain, size, flags)
    assert least == pytest.approx(reading * (2 * 2 + 8))


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--case=Z"], "--case=Z"),
        (["--repeats=0"], "--repeats=0"),
        (["--device=gpu"], "--device=gpu"),
        (["--dtype=bfloat16"], "--dtype=bfloat16"),
        (["--only=verl"], "verl"),
    ],
)
def test_bad_flags_are_one_line(capsys, argv, names):
    with pytest.raises(SystemExit) as error:
        bench_step.main(["--shape=tiny", *argv])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and names in message


# --- tables -------------------------------------------------------------------------------------------


def test_a_table_has_the_columns_its_lines_fill():
    about = {"bench": "step", "unit": "completion tokens/s", "shape": "small", "dtype": "float32"}
    about |= {"device": "cpu", "allocator": "tuned", "case": "W", "limit": 1234.5}
    seconds = {"ours": [1.0, 1.0], "peer": [2.0, 3.0]}
    lines = [
        {
            **about,
            "peer_name": "trl",
            "ours": 300.0,
            "peer": 100.0,
            "ratio": 3.0,
            "target": 2.5,
            "seconds": seconds,
        },
        {**about, "peer_name": "tunix", "ours": 300.0, "peer": 200.0, "ratio": 1.5, "target": 2.0},
    ]
    lines[0]["seconds"] = seconds
    expected = """bench_step, completion tokens/s, small shape, float32, cpu, tuned allocator:

| case | peer | ours | the peer's | ratio | target | limit | spread |
| --- | --- | --- | --- | --- | --- | --- | --- |
| W | trl | 300 | 100 | 3.00 | ≥ 2.5, met | 1,234 | 40% |
| W | tunix | 300 | 200 | 1.50 | ≥ 2.0, missed | 1,234 |  |"""
    assert bench_table.render(lines) == expected


def test_a_ratio_of_seconds_stays_below_its_target():
    assert bench_table.target({"unit": "s", "ratio": 1.2, "target": 1.3}) == "≤ 1.3, met"
    assert bench_table.target({"unit": "CPU s", "ratio": 1.4, "target": 1.3}) == "≤ 1.3, missed"


def test_other_files_are_refused(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"requests": 1}\n')
    for argv in ([], [str(tmp_path / "absent")], [str(path)]):
        with pytest.raises(SystemExit):
            bench_table.main(argv)
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(UserError):
        common.check_flags(argparse.Namespace(repeats=1, case="no", device="cpu"), ("yes",))
