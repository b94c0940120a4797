"""`experiments.real` at the smallest size: from a model folder to a table under two judges, and again."""

import json

import pytest

from configs import quickstart
from experiments import real
from gtalign_jax import jsonl
from gtalign_jax.evaluation.paper import real as tables
from gtalign_jax.run.job import make_job

METHODS = "--methods=base,sft"
CONFIG = (
    "--config=configs/quickstart.py:tiny",
    "--config.max_new_tokens=256",
    "--config.buckets.completion=(256,)",
    "--config.sft.steps=0",
    "--config.sft.epochs=1",
    "--config.data.tasks=('math',)",
    "--config.data.train_per_task=8",
    "--config.steer.tries=0",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_job(quickstart.get_config("tiny"), folder)
    return folder / "init"


def line(welfare, answer, prompt="p", verdict=1.0):
    numbers = {"utility": welfare, "user_reward": welfare, "llm_reward": welfare, "answer_reward": answer}
    said = {"input": prompt, "output": "<response>\n# r\n</response>", "gts": "7", "source": "math-hard"}
    return {
        **said,
        **numbers,
        "format_reward": 1.0,
        "n_tokens": 3,
        "action": "DA",
        "judge": {"verdict": verdict},
    }


def test_from_a_model_to_a_table_and_the_same_again(model, tmp_path, capsys, monkeypatch):
    flags = ["real", *CONFIG, METHODS, "--seeds=0", f"--model={model}", f"--workdir={tmp_path}"]
    real.main([*flags, "--only=models"])
    assert not (tmp_path / "results").exists()
    real.main([*flags, "--only=results"])
    printed = capsys.readouterr().out
    assert "## utility, judged offline" in printed
    assert "| sft |" in printed
    assert "Cohen's kappa" in printed
    # The config's own judge says again what the run was told.
    (run,) = (tmp_path / "runs" / "sft" / "rollouts").glob("sft_*.jsonl")
    ours, again = jsonl.read(run), jsonl.read(tmp_path / "judged" / "offline" / "sft.jsonl")
    for kept in (*ours, *again):
        kept["judge"].pop("latency_s")
    assert ours == again
    assert {each["judge"]["reason"] for each in jsonl.read(tmp_path / "judged" / "on the mesh" / "sft.jsonl")}
    responses = jsonl.read(tmp_path / "chains" / "responses.jsonl")
    assert all("<" not in each["chain"] and each["messages"][0]["role"] == "user" for each in responses)
    for name in ("train_start", "make_job"):
        monkeypatch.setattr(
            f"{'experiments.real' if name == 'train_start' else 'gtalign_jax.run.job'}.{name}", None
        )
    real.main(flags)  # nothing is trained or judged again
    assert capsys.readouterr().out == printed


def test_a_table_of_all_methods(tmp_path):
    good, bad = [line(0.8, 1.0, f"{i}") for i in range(30)], [line(0.2, 0.0, f"{i}") for i in range(30)]
    runs = {"base": [bad], "sft": [bad], "user": [bad], "aligned": [good, good]}
    steps = [{"step": k, "reward/welfare": k / 4, "fluency/mean": None} for k in range(4)]
    text = tables.write_results(
        {tables.FIRST: runs, tables.SECOND: runs}, {"aligned_0": steps, "aligned_1": steps}, tmp_path
    )
    assert "Claim: alignment on mutual welfare beats the cold start and the user's reward alone" in text
    assert text == (tmp_path / "results.md").read_text()
    assert "| sft | +0.600 [+0.600, +0.600] | 0.001 | 1 | 30 |" in text
    assert "**held**" in text
    assert "| math | 150 | 1.00 | 1.00 |" in text
    assert "| aligned_0 | 0.375 to 0.375 | - |" in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["utility, judged offline"]["rows"]["aligned"]["utility"]["mean"] == pytest.approx(0.8)
    assert (tmp_path / "chains.md").read_text().count("**math**") == tables.N_CHAINS
    assert "\n    # r\n" in (tmp_path / "chains.md").read_text()  # a quotation, no heading
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--methods=nosuch", "--methods=nosuch: no such method; use base, sft, plain, user, aligned"),
        ("--only=some", "--only=some: must be models or results"),
        ("--seeds=x", "--seeds=x: give whole numbers"),
    ],
)
def test_what_is_wrong_is_one_line(flag, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        real.main(["real", *CONFIG, f"--workdir={tmp_path}", flag])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
