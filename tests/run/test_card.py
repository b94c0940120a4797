"""Model cards say what the run's files say; somebody else's stays; the hub's refusals are lines."""

import hashlib

import pytest
from huggingface_hub import ModelCard

from configs import quickstart
from experiments import export
from gtalign_jax.errors import UserError
from gtalign_jax.models import folders
from gtalign_jax.run.card import model_card, write_card

SUMMARY = {
    model: {
        "overall": {
            "utility": {"mean": mean, "lo": mean - 0.1, "hi": mean + 0.1, "n": 9},
            "n_tokens": {"mean": 87.84, "lo": 80.0, "hi": 90.0, "n": 9},
        }
    }
    for model, mean in (("sft", 0.4), ("aligned", 0.5))
}


def config(**start):
    made = quickstart.get_config().to_dict()
    made["start"].update(start)
    return made


def test_a_card_says_what_the_run_did_and_how_well():
    text = model_card(config(path="/models/SmolLM2"), SUMMARY, {"model.safetensors": "ab12"})
    card = ModelCard(text)
    assert card.data.base_model == "SmolLM2"
    assert card.data.library_name == "transformers"
    for part in (
        "tasks math, medium, ambig_qa, wildguard",
        "960 steps of 16 prompts",
        "`grpo`, 50 steps of 16 prompts × 8 answers, learning rate 0.0003, seed 0",
        "`cobb_douglas`, α = 0.5",
        "| overall | 0.400 [0.300, 0.500] | 0.500 [0.400, 0.600] |",
        "87.8 [80.0, 90.0]",
        "`model.safetensors`: SHA-256 `ab12`",
        "experiments.steer --model=FOLDER --step=0.5 --prompt=",
    ):
        assert part in text
    assert "/models" not in text  # where it lay is nobody's business


def test_a_model_that_reads_one_decimal_needs_no_step():
    fine = config()
    fine["steer"]["step"] = 0.1
    assert "experiments.steer --model=FOLDER --prompt=" in model_card(fine, None, {})


def test_a_cold_start_that_counts_in_epochs_says_so():
    counted = config()
    counted["sft"].update(epochs=2, steps=0)
    said = model_card(counted, None, {})
    assert "cold start: 2 passes over the demonstrations, in steps of 16 prompts" in said


def test_a_checkpoint_that_was_not_evaluated_says_so():
    assert "not evaluated by its run" in model_card(config(), None, {})
    assert "start: from nothing" in model_card(config(), None, {})


def test_a_card_is_written_over_its_own_and_over_nobody_elses(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_card(tmp_path, config(), None)
    first = (tmp_path / "README.md").read_text()
    assert hashlib.sha256(b"weights").hexdigest() in first
    assert folders.foreign(tmp_path) == []
    write_card(tmp_path, config(), SUMMARY)
    assert "0.500 [0.400, 0.600]" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, config(), SUMMARY)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert folders.foreign(tmp_path) == ["README.md"]


class Hub:
    """In place of the hub's client: there is no hub here."""

    calls: list = []

    def create_repo(self, name, exist_ok):
        self.calls.append((name, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        return f"https://hub/{repo_id}"


def test_an_upload_goes_to_the_named_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "HfApi", Hub)
    assert export.push(tmp_path, "me/model") == "https://hub/me/model"
    assert Hub.calls == [("me/model", True)]


def test_a_hub_that_refuses_is_one_line_and_the_model_stays(tmp_path, monkeypatch):
    def refuse(self, name, exist_ok):
        raise export.LocalTokenNotFoundError("Token is required,\nbut no token found.")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    monkeypatch.setattr(export, "HfApi", Hub)
    with pytest.raises(
        UserError, match=f"me/model: Token is required, but no token found.; the model stands in {tmp_path}"
    ):
        export.push(tmp_path, "me/model")


@pytest.mark.parametrize(
    ("name", "out", "words"), [("a b", "x", "a b"), ("me/model", "gs://b/x", "on a store")]
)
def test_a_name_or_place_that_cannot_be_is_refused_first(name, out, words):
    with pytest.raises(UserError, match=words):
        export.check_hub(name, export.paths.path(out))
