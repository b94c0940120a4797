"""An evaluation is kept under what it is of: other weights or data, or a torn file, make it anew."""

import types

import pytest

from gtalign_jax import jsonl
from gtalign_jax.evaluation import heldout
from gtalign_jax.rewards.judges.base import Verdict
from gtalign_jax.run.rollouts import FIELDS, RolloutLine


def line(output):
    numbers = [name for name in FIELDS if name.endswith(("score", "reward"))]
    fields = dict.fromkeys(numbers, 0.5) | {"input": "q", "output": output, "gts": "g", "source": "s"}
    return RolloutLine(**fields, step=0, utility=0.5, action="DA", n_tokens=3, verdict=Verdict(1.0)).fields()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(evaluate once more, how often it was made); the weights lie in `model`."""
    item = types.SimpleNamespace(messages=[{"role": "user", "content": "q"}], ground_truth="g")
    test = types.SimpleNamespace(items=[item], tokens=[[1, 2]])
    job, count = types.SimpleNamespace(workdir=tmp_path, test=test), []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")

    def evaluate(job, params, step):
        count.append(step)
        return [line(f"{len(count)}.{k}") for k in range(3)]

    monkeypatch.setattr(heldout, "evaluate", evaluate)

    def again(weights=tmp_path / "model"):
        lines = heldout.evaluate_once(job, "model", None, 0, weights=weights)
        assert len(lines) == 3
        return len(count)

    return again, item, tmp_path / "rollouts" / "model_0.jsonl"


def test_an_evaluation_of_the_same_is_made_once(made):
    again, _, _ = made
    assert [again(), again(), again()] == [1, 1, 1]


def test_other_weights_or_data_are_evaluated_anew(made, caplog):
    again, item, path = made
    again()
    folder = path.parent.parent / "model"
    (folder / "model.safetensors").write_bytes(b"weighty")  # as long, in the same second
    assert again() == 2 and "of other weights" in caplog.text
    (folder / "tokenizer.json").write_text("{}")
    assert again() == 3
    item.ground_truth = "h"
    assert again() == 4 and "of other data" in caplog.text
    assert again() == 4


@pytest.mark.parametrize("weights", [True, False])
def test_a_rollout_file_that_is_not_whole_is_made_again(made, weights):
    again, _, path = made
    call = again if weights else lambda: again(None)
    count = call()
    whole = path.read_text()
    first = whole.splitlines(keepends=True)[0]
    short = "".join(
        jsonl.encode({k: v for k, v in x.items() if k != "utility"}) + "\n" for x in jsonl.read(path)
    )
    for text in ("", first, whole[:-40], "{oops\n" + whole, short, whole + first, "[]\n"):
        path.write_text(text)
        count += 1
        assert call() == count, text
    assert call() == count
    path.unlink()
    assert call() == count + 1


def test_an_older_run_without_the_record_is_read(made):
    again, _, path = made
    again(None)
    (path.parent.parent / heldout.RECORD).unlink()
    assert again(None) == 1
    assert again() == 2  # of weights that may have changed, nothing is known
    (path.parent.parent / heldout.RECORD).write_text("[")
    assert again() == 3
    assert again() == 3
