"""Each rule fires on the run it is for, once, at the step where it begins, and stays quiet otherwise."""

import math

from gtalign_jax.run.health import HealthConfig, check, scan

CONFIG = HealthConfig(window=2, nonfinite_patience=3)


def _run(n, **series):
    """n records; a series maps a key (/ written __) to a function of the step."""
    healthy = {
        "kl/ref": lambda s: 0.01 * s,
        "entropy/mean": lambda s: 1.0 - 0.01 * s,
        "reward/format": lambda s: 0.9,
        "reward/welfare": lambda s: 0.5,
        "length/truncated": lambda s: 0.0,
        "judge/missing": lambda s: 0.0,
        "group/zero_variance": lambda s: 0.3,
    }
    healthy |= {key.replace("__", "/"): f for key, f in series.items()}
    return [{"phase": "rl", "step": s, "time": 0.0} | {k: f(s) for k, f in healthy.items()} for s in range(n)]


def _kinds(records):
    return [(f.kind, f.step) for f in scan(records, CONFIG)]


def test_a_healthy_run_has_no_findings():
    assert scan(_run(30), CONFIG) == ()
    assert check([], CONFIG) == ()


def test_a_policy_that_runs_away_is_found_once():
    records = _run(12, kl__ref=lambda s: 0.1 if s < 6 else 3.0)
    assert _kinds(records) == [("kl", 6)]
    (finding,) = scan(records, CONFIG)
    assert str(finding).startswith("health: rl step 6: KL to the reference is 1.55")
    assert "learning rate" in finding.message and not finding.stop


def test_entropy_collapse_needs_a_low_level_and_a_fall():
    assert _kinds(_run(12, entropy__mean=lambda s: 1.0 if s < 5 else 0.001)) == [("entropy", 6)]
    assert _kinds(_run(12, entropy__mean=lambda s: 0.01)) == []


def test_a_lost_format_names_the_likely_cause():
    def lost(s):
        return 0.9 if s < 5 else 0.0

    (cut,) = scan(_run(9, reward__format=lost, length__truncated=lambda s: 0.0 if s < 5 else 1.0), CONFIG)
    assert (cut.kind, cut.step) == ("format", 6) and "token budget" in cut.message
    (plain,) = scan(_run(9, reward__format=lost), CONFIG)
    assert "90% to 0%" in plain.message and "format term" in plain.message
    drifted = scan(_run(9, reward__format=lost, kl__ref=lambda s: 0.0 if s < 5 else 9.0), CONFIG)
    assert "left the reference" in next(f.message for f in drifted if f.kind == "format")
    assert _kinds(_run(9, reward__format=lambda s: 0.0)) == []


def test_a_streak_of_nonfinite_steps_stops_the_run():
    records = _run(10, loss__policy=lambda s: None if s in (2, 5, 6, 7, 8) else 0.1)
    assert _kinds(records) == [("nonfinite", 2), ("nonfinite", 5), ("nonfinite_streak", 7)]
    assert [f.stop for f in scan(records, CONFIG)] == [False, False, True]
    assert "loss/policy not finite" in scan(records, CONFIG)[0].message
    reward = _run(3, reward__welfare=lambda s: math.nan if s == 1 else 0.5)
    assert "reward function" in scan(reward, CONFIG)[0].message


def test_a_run_that_ends_for_its_reward_does_not_blame_the_learning_rate():
    (_, rewards) = scan(_run(3, reward__welfare=lambda s: math.nan), CONFIG)
    (_, losses) = scan(_run(3, loss__policy=lambda s: math.nan), CONFIG)
    assert rewards.stop and "mend the reward function" in rewards.message
    assert "learning rate" not in rewards.message and "learning rate" in losses.message


def test_a_judge_outage_and_flat_groups_are_named():
    assert _kinds(_run(6, judge__missing=lambda s: 1.0 if s > 2 else 0.0)) == [("judge", 4)]
    assert _kinds(_run(6, group__zero_variance=lambda s: 1.0)) == [("flat", 1)]


def test_check_reports_what_begins_at_the_newest_step():
    records = _run(12, kl__ref=lambda s: 0.1 if s < 6 else 3.0)
    stepwise = [f for i in range(len(records)) for f in check(records[: i + 1], CONFIG)]
    assert tuple(stepwise) == scan(records, CONFIG)
    assert check(records[:7], CONFIG) and not check(records[:8], CONFIG)


def test_phases_are_judged_apart():
    sft = [{"phase": "sft", "step": s, "time": 0.0, "loss/sft": 1.0} for s in range(4)]
    assert _only(scan(sft + _run(4, loss__policy=lambda s: None), CONFIG)) == {"rl"}


def _only(findings):
    return {f.phase for f in findings}


def test_a_gap_that_climbs_is_found_though_it_is_small():
    """vLLM with an old head: 6e-7 to 0.022 in five steps."""
    gaps = [6e-7, 1.2e-6, 2e-3, 9e-3, 2.2e-2, 2.3e-2]
    (finding,) = scan(_run(6, sampler__gap=gaps.__getitem__), CONFIG)
    assert (finding.kind, finding.step, finding.stop) == ("gap", 2, False)
    assert "6e-07" not in finding.message and "9e-07 to 0.001 nats" in finding.message
    assert "align.overlap" in finding.message
    (served,) = scan(_run(6, sampler__gap=gaps.__getitem__, engine__requests=lambda s: 8), CONFIG)
    assert "RUN/engine" in served.message


def test_a_gap_above_its_limit_is_found_and_rounding_is_not():
    assert _kinds(_run(6, sampler__gap=lambda s: 0.03)) == [("gap", 0)]
    assert _kinds(_run(6, sampler__gap=lambda s: 0.015)) == []
    assert _kinds(_run(6, sampler__gap=lambda s: 1e-7 if s < 3 else 9e-4)) == []
    assert _kinds(_run(6, sampler__gap=lambda s: None if s == 3 else 1e-7)) == [("nonfinite", 3)]


def _sft_run(*losses):
    return [{"phase": "sft", "step": s, "time": 0.0, "loss/sft": loss} for s, loss in enumerate(losses)]


def test_an_sft_loss_far_above_its_first_value_is_found():
    """A learning rate for models from scratch on a pretrained one."""
    (finding,) = scan(_sft_run(1.09, 1.9, 3.03), CONFIG)
    assert (finding.kind, finding.step, finding.stop) == ("sft", 2, False)
    assert "1.09 to 3.03" in finding.message and "sft_optimizer.lr" in finding.message
    assert scan(_sft_run(7.0, 3.0, 1.0, 1.9, 0.5), CONFIG) == ()
    assert scan(_sft_run(1.0, 1.6, 0.7, 1.4), CONFIG) == ()
    assert scan(_sft_run(0.1, 0.25, 0.1), CONFIG) == ()


def test_reward_that_rises_while_fluency_falls_is_hacking():
    falls = lambda s: -1.0 if s < 6 else -2.0
    rises = lambda s: 0.4 + 0.01 * s
    records = _run(12, reward__welfare=rises, fluency__mean=falls)
    assert _kinds(records) == [("hacking", 7)]
    (finding,) = scan(records, CONFIG)
    assert "fluency fell from -1.00 to -2.00" in finding.message and "reward hacking" in finding.message
    assert _kinds(_run(12, reward__welfare=lambda s: 0.6 - 0.01 * s, fluency__mean=falls)) == []
    assert _kinds(_run(12, reward__welfare=rises, fluency__mean=lambda s: -1.0 - 0.02 * s)) == []
    assert _kinds(_run(12, reward__welfare=rises)) == []  # without a reference nobody knows
