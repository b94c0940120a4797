"""The whole path on the tiny quickstart: files, resume after kills, HF export, no recompilation."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments import export
from experiments.check_kills import digests, steps
from gtalign_jax import config as config_lib
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts, paths
from gtalign_jax.mesh import memory
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.rollout import generate
from gtalign_jax.rollout.buckets import BucketConfig
from gtalign_jax.rollout.folder import EngineOptions, load_engine
from gtalign_jax.rollout.request import Request
from gtalign_jax.rollout.sampling import GREEDY
from gtalign_jax.run.export import export_checkpoint, list_checkpoints
from gtalign_jax.run.job import make_job
from gtalign_jax.run.record import check_config
from gtalign_jax.train import evaluate_model, train

REPO = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/quickstart.py:tiny"
MATH = ["--config.data.tasks=('math',)"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir) begins the job in a process of its own; compiled programs are shared by a cache."""
    cache = tmp_path_factory.mktemp("compiled")
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "",  # one device, and the code generator that users have
    }
    command = [sys.executable, "-m", "experiments.train", CONFIG]

    def begin(workdir: pathlib.Path) -> subprocess.Popen:
        env = os.environ | settings
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=REPO, env=env, **options)

    return begin


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """(workdir, stdout) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("run")
    process = start(workdir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir, out


def test_a_run_leaves_the_files_of_the_contract(run):
    workdir, out = run
    for name in "config.json metrics.jsonl summary.json report.html steering.jsonl".split():
        assert (workdir / name).is_file(), name
    for name in ("checkpoints", "rollouts", "figures", "tensorboard", "hf"):
        assert any((workdir / name).iterdir()), name
    summary = json.loads((workdir / "summary.json").read_text())
    assert list(summary) == ["sft", "aligned"]
    tasks = {"math", "medium", "ambig_qa", "wildguard", "overall"}
    assert set(summary["aligned"]) == tasks
    assert {"mean", "lo", "hi", "n", "clusters"} == set(summary["aligned"]["overall"]["utility"])
    assert "overall" in out and str(workdir / "hf") in out
    rollouts = jsonl.read(workdir / "rollouts" / "train_3.jsonl")
    assert len(rollouts) == 2 * 8 and rollouts[0]["judge"].keys() == {"verdict", "reason", "latency_s"}


def test_nothing_is_compiled_after_the_first_step_of_a_phase(run):
    lines = jsonl.read(run[0] / "metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in lines] == [
        (phase, k) for phase in ("sft", "align") for k in range(4)
    ]
    assert all(line["compile/programs"] > 0 for line in lines if line["step"] == 0)
    assert all(line["compile/programs"] == 0 for line in lines if line["step"] > 0)


def kill_at(process, workdir, phase, step):
    """SIGKILL once the step is on record."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        seen = jsonl.read(workdir / "metrics.jsonl")
        if any(line["phase"] == phase and line["step"] >= step for line in seen):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_ends_with_the_same_bytes(run, start, tmp_path):
    kill_at(start(tmp_path), tmp_path, "sft", 2)
    kill_at(start(tmp_path), tmp_path, "align", 2)
    process = start(tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert digests(tmp_path, ["hf", "rollouts"]) == digests(run[0], ["hf", "rollouts"])
    assert steps(tmp_path) == steps(run[0])
    assert (tmp_path / "summary.json").read_text() == (run[0] / "summary.json").read_text()


def contents(folder):
    """Name inside a folder, on a disk or a store → bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in drafts.files_under(folder)}


def test_a_killed_run_on_a_store_ends_with_the_same_bytes(run, start, gs, amazon, capsys):
    workdir = paths.path(f"{gs}/runs/killed")
    for mark in ("sft/2/commit_success.txt", "align/2/_CHECKPOINT_METADATA"):  # the second in a save
        process = start(workdir)
        while not (workdir / "checkpoints" / mark).is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.kill()
        process.communicate()
    process = start(workdir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and f"model   {workdir}/hf" in out, err
    for name in ("hf", "rollouts"):
        assert contents(workdir / name) == contents(run[0] / name), name
    assert steps(workdir) == steps(run[0])
    assert (workdir / "report.html").is_file() and contents(workdir / "tensorboard")
    assert not (workdir / "run.lock").exists()

    config, _ = config_lib.parse_command(["prog", CONFIG, "--workdir=x"], {"workdir": ""})
    evaluate_model(config, f"{workdir}/hf", paths.path(f"{gs}/evaluated"), "again")
    again = jsonl.read(f"{gs}/evaluated/rollouts/again_0.jsonl")
    first = jsonl.read(run[0] / "rollouts" / "aligned_4.jsonl")
    assert [line["output"] for line in again] == [line["output"] for line in first]
    export.main([f"--checkpoint={workdir}/checkpoints", f"--out={amazon}/exported/hf"])
    assert f"align step 4 written to {amazon}/exported/hf" in capsys.readouterr().err
    assert contents(paths.path(f"{amazon}/exported/hf")) == contents(run[0] / "hf")


def interrupted_at(process, path):
    """stderr of a run that met Ctrl-C once it had made a file; another process's files can only be polled."""
    while not path.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    return err


def test_ctrl_c_saves_and_says_how_to_go_on(start, tmp_path):
    process = start(tmp_path)
    err = interrupted_at(process, tmp_path / "metrics.jsonl")
    assert process.returncode == 130 and "run the same command to go on" in err
    assert any((tmp_path / "checkpoints" / "sft").iterdir())


def test_an_early_ctrl_c_is_one_line(start, tmp_path):
    process = start(tmp_path)
    err = interrupted_at(process, tmp_path / "run.lock")
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not (tmp_path / "run.lock").exists() and not (tmp_path / "checkpoints").exists()


def test_the_export_generates_the_same_greedy_tokens_in_pytorch(run):
    folder, new = run[0] / "hf", 64
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    buckets = BucketConfig(prompt=(96,), completion=(new,))
    engine, params = load_engine(str(folder), EngineOptions(sampling=GREEDY, buckets=buckets))
    lines = jsonl.read(run[0] / "rollouts" / "aligned_4.jsonl")
    texts = list(dict.fromkeys(line["input"] for line in lines))[:8]
    ids = [engine_lib.encode(engine, [{"role": "user", "content": text}]) for text in texts]
    batch = engine_lib.prompt_batch(engine, ids)
    rollout = generate.rollout(engine, params, Request(batch, jax.random.key(0), 1, new))
    ours = engine_lib.completion_ids(rollout.completions)
    for mine, prompt, text in zip(ours, ids, texts, strict=True):
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == prompt
        with torch.no_grad():
            out = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
        np.testing.assert_array_equal(mine, out[0, len(prompt) :].numpy())


def test_exporting_the_checkpoints_gives_the_same_folder(run, tmp_path):
    assert export_checkpoint(run[0] / "checkpoints", tmp_path / "hf") == "align step 4"
    assert digests(tmp_path, ["hf"]) == digests(run[0], ["hf"])
    told = [line.split() for line in list_checkpoints(run[0] / "checkpoints")]
    assert [(phase, step) for phase, step, *_ in told] == [
        ("sft", "2"),
        ("sft", "4"),
        ("align", "2"),
        ("align", "4"),
    ]
    assert all(len(line) == (6 if line[0] == "align" else 4) for line in told)  # W, and nothing damaged
    with pytest.raises(UserError, match="config.json: not found"):
        export_checkpoint(tmp_path / "checkpoints", tmp_path / "other")
    with pytest.raises(UserError, match="--best: config.checkpoint.keep_best=0"):
        export_checkpoint(run[0] / "checkpoints", tmp_path / "best", best=True)


def test_exporting_takes_a_step_and_passes_over_a_damaged_newest_one(run, tmp_path):
    copy = tmp_path / "run"
    for name in ("checkpoints", "init"):
        shutil.copytree(run[0] / name, copy / name)
    shutil.copy(run[0] / "config.json", copy)
    assert export_checkpoint(copy / "checkpoints", tmp_path / "two" / "hf", step=2) == "align step 2"
    with pytest.raises(
        UserError, match="--step=9: .* no such checkpoint, but sft 2, sft 4, align 2, align 4"
    ):
        export_checkpoint(copy / "checkpoints", tmp_path / "nine", step=9)
    largest = max((copy / "checkpoints" / "align" / "4").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert list_checkpoints(copy / "checkpoints")[-1].partition("damaged: ")[2].endswith("another checksum")
    assert export_checkpoint(copy / "checkpoints", tmp_path / "newest" / "hf") == "align step 2"
    assert digests(tmp_path / "newest", ["hf"]) == digests(tmp_path / "two", ["hf"])
    shutil.rmtree(copy / "checkpoints" / "align")
    (copy / "checkpoints" / "align").write_text("")
    with pytest.raises(UserError, match="align: is a file where checkpoints belong"):
        export_checkpoint(copy / "checkpoints", tmp_path / "none")


def test_evaluating_the_export_repeats_the_runs_own_evaluation(run, tmp_path, capsys):
    config, _ = config_lib.parse_command(["prog", CONFIG, "--workdir=x"], {"workdir": ""})
    evaluate_model(config, str(run[0] / "hf"), tmp_path, "again")
    again = jsonl.read(tmp_path / "rollouts" / "again_0.jsonl")
    first = jsonl.read(run[0] / "rollouts" / "aligned_4.jsonl")
    assert [line["output"] for line in again] == [line["output"] for line in first]
    assert list(json.loads((tmp_path / "summary.json").read_text())) == ["again"]
    assert "overall" in capsys.readouterr().out


def test_the_report_is_one_page_without_a_network(run):
    page = (run[0] / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for part in ("Results", "Pareto", "Training", "Samples", "Settings"):
        assert part in page


def test_another_config_in_the_same_folder_is_refused_untouched(run):
    before = digests(run[0], ["."])
    config, _ = config_lib.parse_command(
        ["prog", CONFIG, "--config.sft.steps=9", "--workdir=x"], {"workdir": ""}
    )
    with pytest.raises(UserError, match=r"config.sft.steps \(4, now 9\)"):
        check_config(config, run[0])
    assert digests(run[0], ["."]) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.source=web"], "config.data.source='web'"),
        (["--config.data.source=gtalign", "--config.data.root=/nowhere"], "config.data.root='/nowhere'"),
        (["--config.data.tasks=('math','poetry')"], "'poetry' is not a task; known: math"),
        (["--config.buckets.prompt=(8,)"], "raise the last of config.buckets.prompt"),
        (
            [*MATH, "--config.data.train_per_task=1"],
            "config.align.prompts=2: there are only 1 training prompts",
        ),
        (
            [*MATH, "--config.data.train_per_task=3"],
            "config.sft.prompts=4: there are only 3 training prompts",
        ),
        (["--config.max_new_tokens=20"], "config.max_new_tokens=20: no demonstration fits"),
        (["--config.align.algorithm=reinforce"], "'reinforce': use one of"),
        (["--config.reward.fn=fame"], "config.reward.fn='fame'"),
        (["--config.align.prompts=3", "--config.algorithm.minibatches=2"], "config.align.prompts=3"),
        (["--config.mesh.fsdp=16"], "needs 16 devices"),
        (["--config.start.path=/no/model"], "/no/model"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path, flags, message):
    config, _ = config_lib.parse_command(["prog", CONFIG, "--workdir=x", *flags], {"workdir": ""})
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        make_job(config, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "sft update needs .* raise config.sft.microbatches"),
        (["--config.sft.steps=0"], "evaluation needs .* lower config.evaluate.prompts"),
    ],
)
def test_a_program_that_does_not_fit_is_refused_before_it_runs(tmp_path, monkeypatch, flags, line):
    config, _ = config_lib.parse_command(["train", CONFIG, *MATH, *flags], {})
    monkeypatch.setattr(memory, "free_bytes", lambda: 100)
    with pytest.raises(UserError, match=f"^out of memory: {line}"):
        train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()
