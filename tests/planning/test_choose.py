"""What is left to us is the cheapest that fits, found in few compilations, and stays with its run."""

import json

import jax
import pytest

from gtalign_jax import config as config_lib
from gtalign_jax import train as train_lib
from gtalign_jax.errors import UserError
from gtalign_jax.mesh.memory import GIB
from gtalign_jax.planning import choose as choose_lib
from gtalign_jax.planning.choose import choose, choose_for_run, first_fitting
from gtalign_jax.planning.needs import Needs
from gtalign_jax.run import auto
from gtalign_jax.run.job import make_job, with_settings
from gtalign_jax.run.settings import make_settings

ALL = [f"--config.{field}=auto" for field in auto.FIELDS]
CONFIG = "--config=configs/quickstart.py:tiny"
SIZES = ["--config.sft.prompts=32", "--config.align.prompts=32", "--config.start.scan_layers=True"]


def config_of(*flags):
    return config_lib.parse_command(["train", CONFIG, *flags], {})[0]


@pytest.mark.parametrize("sparing", [False, True])
@pytest.mark.parametrize("bound", [*range(1, 9), 60, 64, 100])
def test_the_first_that_fits_is_found_in_few_trials(bound, sparing):
    values, tried = [1, 2, 4, 8, 16, 32, 64], []

    def fits(value):
        tried.append(value)
        return value >= bound

    assert first_fitting(values, fits, sparing) == next((v for v in values if v >= bound), None)
    assert len(tried) <= (4 if sparing else 1 if bound == 1 else 5)
    assert len(set(tried)) == len(tried) and (bound <= 64 or len(tried) == 2 - sparing)


def needs_like(asked):
    """Needs of a model whose layers keep 64 GiB, a quarter of it with `dots` and a sixteenth with `full`; of
    which blocks of keys save an eighth. 1 GiB stays whatever is done."""

    def of(settings, parts):
        kept = {"none": 64, "dots": 16, "full": 4}[settings.start.remat]
        kept *= 0.875 if settings.start.attention == "chunked" else 1
        asked.append((settings.start.remat, settings.start.attention, parts))
        return GIB * (1 + kept / parts)

    return Needs(
        lambda s: of(s, s.sft.microbatches),
        lambda s: of(s, s.algorithm.microbatches),
        lambda s: GIB * (1 + s.align.prompts_at_once),
    )


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (66, ("none", "auto", 1, 0)),
        (33.5, ("none", "auto", 2, 0)),
        (17, ("none", "auto", 4, 16)),
        (3, ("none", "auto", 32, 2)),
        (2.9, ("none", "chunked", 32, 1)),
        (2.4, ("dots", "chunked", 16, 1)),
        (2, ("dots", "chunked", 16, 1)),
    ],
)
def test_the_cheapest_that_fits_is_chosen_in_the_stated_order(free, expected):
    asked = []
    chosen = choose(config_of(*ALL, *SIZES), needs_like(asked), free * GIB, 1, lambda line: None)
    remat, attention, parts, prompts = expected
    assert chosen == {
        "start.remat": remat,
        "sft.microbatches": parts,
        "algorithm.microbatches": parts,
        "align.rollout_prompts": prompts,
        "start.attention": attention,
    }
    assert len(asked) <= 2 * 5 + 2  # few programs are compiled


def test_what_is_not_left_to_us_stays_as_it_is():
    flags = ["--config.sft.microbatches=auto", "--config.start.remat=full"]
    flags += ["--config.algorithm.microbatches=8", "--config.align.rollout_prompts=1"]
    asked = []
    chosen = choose(config_of(*flags, *SIZES), needs_like(asked), 2.5 * GIB, 2, lambda line: None)
    assert chosen == {"sft.microbatches": 4, "start.attention": "auto"}
    assert {remat for remat, _, _ in asked} == {"full"}


@pytest.mark.parametrize(
    ("flags", "free", "line"),
    [
        (
            ALL,
            1.05,
            "sft update needs 1.11 GiB with start.remat=full, .*sft.microbatches=32, and a device has",
        ),
        (ALL, 1.5, "generation needs 2.00 GiB with .*align.rollout_prompts=1, and a device has 1.50 GiB"),
        (ALL[1:2], 2, "sft update needs 2.75 .*; set config.start.remat=auto, lower config.max_new_tokens"),
    ],
)
def test_where_nothing_fits_one_line_says_what_to_change(flags, free, line):
    with pytest.raises(UserError, match=f"^out of memory: {line}") as caught:
        choose(config_of(*flags, *SIZES), needs_like([]), free * GIB, 1, lambda line: None)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(config, job): nothing of it has run."""
    config = config_of(*ALL, *SIZES[2:], "--config.data.tasks=('math',)", "--config.sft.steps=0")
    return config, make_job(config, tmp_path_factory.mktemp("run"))


def test_a_run_chooses_from_its_compiled_programs(begun, capsys):
    """With the memory of the cheapest setting that setting, with a byte less another."""
    config, job = begun
    tried = []
    cheapest = choose_for_run(config, job, free=2.0**60)
    assert cheapest == {**auto.FIELDS, "start.attention": "auto"}
    say = capsys.readouterr().err
    assert "auto: update with start.remat=none" in say and "auto: start.remat=none, sft.microbatches=1" in say
    with jax.set_mesh(job.mesh):
        needs = choose_lib.needs_of_run(job, tried.append)
        most = max(need(make_settings(config)) for need in (needs.update, needs.rollout))
        assert choose(config, needs, most, 1, tried.append) == cheapest
        other = choose(config, needs, most - 1, 1, tried.append)
    assert other["algorithm.microbatches"] == 2 and other["start.remat"] == "none"


def test_epochs_are_chosen_for_as_steps_are(tmp_path):
    """Their number of steps follows from the demonstrations, and stays when the choice is made."""
    flags = ["--config.sft.microbatches=auto", "--config.sft.steps=0", "--config.sft.epochs=2"]
    config = config_of(*flags, "--config.align.steps=0", "--config.data.tasks=('math',)")
    job = make_job(config, tmp_path)
    assert job.settings.sft.steps == 2 * len(job.demonstrations) // 4
    with pytest.raises(UserError, match="^out of memory: sft update needs .* with .*sft.microbatches=4"):
        choose_for_run(config, job, free=1.0)
    settings = make_settings(auto.with_values(config, {"sft.microbatches": 2}))
    assert with_settings(job, settings).settings.sft.steps == job.settings.sft.steps


def test_a_run_keeps_what_was_chosen_for_it(tmp_path, monkeypatch):
    """Also when it goes on with other memory; and who reads its config finds numbers."""
    found = {"start.remat": "dots", "sft.microbatches": 2, "algorithm.microbatches": 2}
    found |= {"align.rollout_prompts": 1, "start.attention": "chunked"}
    monkeypatch.setattr(train_lib, "choose_for_run", lambda config, job: found)
    config = config_of(*ALL, "--config.data.tasks=('math',)")
    now, job = train_lib._make_job(config, tmp_path)
    assert not auto.asked(now) and job.model.runtime.remat == "dots" == job.settings.start.remat
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["chosen"] == found and recorded["sft"]["microbatches"] == 2
    assert (tmp_path / "init" / "config.json").is_file()  # the model that was made meanwhile is still there

    (tmp_path / "metrics.jsonl").write_text('{"phase": "sft", "step": 0}\n')
    monkeypatch.setattr(train_lib, "choose_for_run", lambda config, job: pytest.fail("chosen again"))
    again, job = train_lib._make_job(config, tmp_path)
    assert auto.value_of(again, "align.rollout_prompts") == 1 == job.settings.align.rollout_prompts
    same = config_of("--config.data.tasks=('math',)", *(f"--config.{k}={v}" for k, v in found.items()))
    train_lib._make_job(same, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == recorded
    train_lib._make_job(
        config_of(*ALL, "--config.data.tasks=('math',)", "--config.sft_optimizer.lr=1e-3"), tmp_path
    )
    changed = json.loads((tmp_path / "config.json").read_text())
    assert changed["chosen"] == found and list(changed["history"][0]["changed"]) == ["sft_optimizer.lr"]
    other = config_of("--config.data.tasks=('math',)", *ALL[:-1], "--config.align.rollout_prompts=2")
    with pytest.raises(UserError, match="another config.align.rollout_prompts"):
        train_lib._make_job(other, tmp_path)
