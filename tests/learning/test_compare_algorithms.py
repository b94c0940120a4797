"""The table over seeds: Student intervals, gains over the shared start, what a single seed cannot say."""

import json
import math

import pytest

from experiments import compare_algorithms as compare
from gtalign_jax.errors import UserError

SFT = {
    "utility": {"mean": 0.5, "lo": 0.4, "hi": 0.6, "n": 64},
    "n_tokens": {"mean": 90.0, "lo": 80, "hi": 99, "n": 64},
}


def test_student_interval():
    """t(0.975; 2) = 4.302653: three seeds 1, 2, 3 give 2 +- 4.302653 / sqrt(3)."""
    got = compare.over_seeds([1.0, 2.0, 3.0])
    assert (got["mean"], got["n"]) == (2.0, 3)
    assert got["hi"] - 2.0 == pytest.approx(2.484138, abs=1e-5) == 2.0 - got["lo"]
    alone = compare.over_seeds([0.3])
    assert alone["mean"] == 0.3 and math.isnan(alone["lo"]) and math.isnan(alone["hi"])


def test_table_and_gain():
    runs = {
        "grpo": [{"utility": 0.7}, {"utility": 0.8}],
        "ppo": [{"utility": 0.6, compare.EXPLAINED: 0.9}] * 2,
    }
    table = compare.compare(SFT, runs)
    assert table["grpo"]["gain"]["mean"] == pytest.approx(0.25)
    assert table["ppo"]["gain"]["lo"] == pytest.approx(0.1) == table["ppo"]["gain"]["hi"]
    assert compare.EXPLAINED not in table["grpo"] and table["ppo"][compare.EXPLAINED]["mean"] == 0.9
    lines = compare.format_markdown(table, 2).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["grpo", "ppo", "sft"]
    assert "0.900 [0.900, 0.900]" in lines[3] and "90.0 [80.0, 99.0]" in lines[4]


def test_numbers_of_a_run(tmp_path):
    """Explained variance is the mean of the last ten alignment steps that have one."""
    overall = {"utility": {"mean": 0.7}, "n_tokens": {"mean": 12.0}, "reward_gap": {"mean": 1.0}}
    (tmp_path / "summary.json").write_text(json.dumps({"aligned": {"overall": overall}}))
    lines = [{"phase": "sft", "step": 0, "value/explained_variance": 9.0}]
    lines += [{"phase": "align", "step": k, "value/explained_variance": k / 10} for k in range(12)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    got = compare.run_numbers(tmp_path)
    assert got == pytest.approx({"utility": 0.7, "n_tokens": 12.0, compare.EXPLAINED: 0.65})


@pytest.mark.parametrize(
    "flag", ["--seeds=0,x", "--presets=grpo,pppo", "--seeds=1,1", "--seeds=-1", "--presets=grpo,ppo,grpo"]
)
def test_wrong_flags_stop_before_any_training(flag, tmp_path, capsys):
    argv = ["compare", "--config=configs/quickstart.py:tiny", f"--workdir={tmp_path / 'w'}", flag]
    with pytest.raises(SystemExit) as caught:
        compare.main(argv)
    assert caught.value.code == 2 and not (tmp_path / "w").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_seed_is_a_number():
    assert compare.read_seeds("0,12") == [0, 12]
    with pytest.raises(UserError, match="--seeds: 1 stands there twice"):
        compare.read_seeds("1,0,1")
    with pytest.raises(UserError, match="--seeds=a: give whole numbers"):
        compare.read_seeds("a")
