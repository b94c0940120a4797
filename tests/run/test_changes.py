"""What of a run may change in mid-run, what may not and why, and what its config.json says of it."""

import json

import pytest

from gtalign_jax import config as config_lib
from gtalign_jax.errors import UserError
from gtalign_jax.run import checksums
from gtalign_jax.run.record import check_config, read_config_json, write_config
from gtalign_jax.run.settings import make_settings


def config(*flags):
    flags = ("policy_optimizer.warmup=0", *flags)
    command = [
        "prog",
        "--config=configs/quickstart.py:tiny",
        "--workdir=x",
        *(f"--config.{f}" for f in flags),
    ]
    return config_lib.parse_command(command, {"workdir": ""})[0]


def reach(workdir, **steps):
    """Checkpoints of these steps: reach(workdir, sft=4, align=2)."""
    for phase, step in steps.items():
        state = workdir / "checkpoints" / phase / str(step) / "state"
        state.mkdir(parents=True)
        (state / "array").write_text(phase)
        checksums.write_sums(state.parent)


def go_on(workdir, *flags):
    """Start the run of `workdir` again with these flags."""
    wanted = config(*flags)
    make_settings(wanted)
    check_config(wanted, workdir)
    write_config(wanted, workdir)
    return wanted


@pytest.fixture
def run(tmp_path):
    """A run that has made its cold start and two steps of alignment."""
    write_config(config(), tmp_path)
    reach(tmp_path, sft=4, align=2)
    return tmp_path


@pytest.mark.parametrize(
    "flag",
    [
        "policy_optimizer.lr=1e-5",
        "policy_optimizer.clip_norm=0.1",
        "critic_optimizer.lr=1e-5",
        "align.steps=9",
        "align.steps=3",
        "algorithm.kl_coef=0.2",
        "algorithm.entropy_coef=0.01",
        "align.dump_every=1",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "metrics.tensorboard=False",
        "health.kl_limit=2.0",
        "judge.timeout_s=7.0",
        "judge.cache_dir=/tmp/cache",
        "engine.patience_s=9.0",
        "steer.price=2.0",
        "start.warm_up=False",
    ],
)
def test_what_leaves_the_steps_behind_alone_may_change(run, flag):
    wanted = go_on(run, flag)
    assert make_settings(read_config_json(run)) == make_settings(wanted)
    (entry,) = json.loads((run / "config.json").read_text())["history"]
    assert list(entry["changed"]) == [flag.partition("=")[0]]
    assert entry["after"] == {"sft": 4, "align": 2}
    before = (run / "config.json").read_bytes()
    go_on(run, flag)
    assert (run / "config.json").read_bytes() == before


def test_changes_are_kept_in_order_with_the_steps_before_them(run):
    go_on(run, "policy_optimizer.lr=1e-5")
    reach(run, align=4)
    go_on(run, "policy_optimizer.lr=1e-6", "align.steps=8")
    history = json.loads((run / "config.json").read_text())["history"]
    assert [entry["after"]["align"] for entry in history] == [2, 4]
    assert history[0]["changed"] == {"policy_optimizer.lr": [3e-4, 1e-5]}
    assert history[1]["changed"] == {"align.steps": [4, 8], "policy_optimizer.lr": [1e-5, 1e-6]}


def test_a_damaged_checkpoint_is_not_behind_a_run(run):
    reach(run, align=4)
    (run / "checkpoints" / "align" / "4" / "state" / "array").write_text("")
    go_on(run, "policy_optimizer.lr=1e-5")
    assert json.loads((run / "config.json").read_text())["history"][0]["after"] == {"sft": 4, "align": 2}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("seed=1", r"another config.seed \(0, now 1\): the steps so far were made with it; name a new"),
        ("align.prompts=4", r"config.align.prompts \(2, now 4\): the steps so far"),
        ("reward.alpha=0.4", r"config.reward.alpha \(0.5, now 0.4\): the steps so far"),
        ("algorithm.is_cap=2.0", r"config.algorithm.is_cap \(None, now 2.0\): the steps so far"),
        ("sft.steps=9", r"config.sft.steps \(4, now 9\): alignment has begun"),
        ("sft_optimizer.lr=1e-5", r"config.sft_optimizer.lr \(0.004, now 1e-05\): alignment has begun"),
        ("align.steps=1", r"config.align.steps \(4, now 1\): 2 steps are done; name a new"),
        ("judge.endpoints=('http://host/v1',)", r"config.judge.endpoints .*: another judge or engine made"),
    ],
)
def test_what_made_the_steps_behind_is_refused_with_the_reason(run, flag, message):
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        go_on(run, flag)
    assert "\n" not in str(error.value)
    assert (run / "config.json").read_bytes() == before


def test_the_cold_start_may_change_until_alignment_begins(tmp_path):
    write_config(config(), tmp_path)
    reach(tmp_path, sft=2)
    go_on(tmp_path, "sft.steps=6", "sft_optimizer.lr=1e-3")
    with pytest.raises(UserError, match="2 steps are done"):
        go_on(tmp_path, "sft.steps=1", "sft_optimizer.warmup=0", "sft_optimizer.lr=1e-3")


def test_servers_may_move_and_leave_no_credentials(tmp_path):
    write_config(config("judge.endpoints=('http://one/v1',)", "judge.model=m"), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["judge"]["endpoints"] = ["http://user:hunter2@one/v1"]  # as old runs could
    (tmp_path / "config.json").write_text(json.dumps(fields))
    reach(tmp_path, sft=2)
    go_on(tmp_path, "judge.endpoints=('http://two/v1',)", "judge.model=m")
    text = (tmp_path / "config.json").read_text()
    assert "http://two/v1" in text and "***@one" in text and "hunter2" not in text


def test_a_coefficient_that_a_controller_moves_is_refused(tmp_path):
    write_config(config("algorithm.kl_target=0.1"), tmp_path)
    reach(tmp_path, sft=4, align=2)
    with pytest.raises(UserError, match="its controller goes on from what the checkpoint holds"):
        go_on(tmp_path, "algorithm.kl_target=0.1", "algorithm.kl_coef=0.4")


def test_a_run_with_overlap_cannot_go_on_after_its_last_step(tmp_path):
    write_config(config("align.overlap=True"), tmp_path)
    reach(tmp_path, sft=4, align=2)
    go_on(tmp_path, "align.overlap=True", "align.steps=5")  # the next rollout is in the checkpoint
    reach(tmp_path, align=5)
    with pytest.raises(UserError, match="the last step of a run with align.overlap writes nothing ahead"):
        go_on(tmp_path, "align.overlap=True", "align.steps=9")
