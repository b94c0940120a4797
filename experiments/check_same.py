"""Prove that this tree computes what another revision computed, and that its runs go on here.

    python -m experiments.check_same OLD_REV [--cases=grpo,ppo] [--workdir=DIR]

For every case, `configs/quickstart.py:tiny` with a few flags, the run of OLD_REV is made in a checkout of its
own (once: DIR keeps it), and then, by this tree, in a new folder of DIR:

    same     the whole run again
    resumed  the old run without its last alignment checkpoint and all that came after, gone on with
    export   `experiments.export` of the old run's checkpoints

Export, rollouts, summary, steering examples and metrics (but for times) must be the same bytes. Last,
`evaluate`: both trees evaluate the old run's export. A line a comparison, a JSON line at the end; exits with
1 when any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from experiments.check_kills import differences, digests
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.files import paths

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/quickstart.py:tiny"
_PARTS = "--config.algorithm.microbatch_tokens=2400"
_FOUR = "--config.align.prompts=4"
CASES = {
    "grpo": (),
    "ppo": ("--config.align.algorithm=ppo", _FOUR),
    "microbatch_tokens": (_PARTS,),
    "ppo_microbatch_tokens": ("--config.align.algorithm=ppo", _FOUR, _PARTS),
    "lora": ("--config.lora.rank=4",),
    "overlap": ("--config.align.overlap=True",),
    "dynamic_sampling": ("--config.align.algorithm=dapo",),
    "grammar": ("--config.engine.grammar=True",),
    "queue": ("--config.engine.rows=8", "--config.engine.compact_every=8"),
    "gdpo": ("--config.align.algorithm=gdpo", "--config.align.normalize=zscore"),
    "adaptive_kl": ("--config.algorithm.kl_target=0.05", "--config.algorithm.reference_every=2"),
}
LAST = "4"  # the last alignment checkpoint of the tiny quickstart
AFTER = ("hf", "adapter", "figures", "summary.json", "steering.jsonl", "report.html")


@exit_on_user_error
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old_rev", help="a commit of this repository")
    parser.add_argument("--cases", default=",".join(CASES), help="by comma")
    parser.add_argument("--workdir", default="", help="keeps the old revision's runs; default: a new folder")
    flags = parser.parse_args(argv)
    cases = flags.cases.split(",")
    for case in cases:
        if case not in CASES:
            raise UserError(f"--cases={flags.cases}: {case!r} is not one of {', '.join(CASES)}")
    folder = paths.local(flags.workdir or tempfile.mkdtemp(prefix="check_same_"), "--workdir").resolve()
    old = check_out(flags.old_rev, folder)
    new = pathlib.Path(tempfile.mkdtemp(prefix="new_", dir=folder))
    found: dict[str, list[str]] = {}
    for case in cases:
        found |= compare_case(case, old, new)
    found["evaluate"] = compare_evaluation(cases[0], old, new)
    wrong = [name for name, files in found.items() if files]
    print(json.dumps({"old": flags.old_rev, "comparisons": len(found), "different": wrong}))
    if wrong:
        sys.exit(1)


def check_out(revision: str, folder: pathlib.Path) -> pathlib.Path:
    """The files of a revision, in a folder that keeps its runs too."""
    name = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if name.returncode:
        raise UserError(f"{revision}: no such commit; name one of this repository")
    tree = folder / name.stdout.strip()[:12] / "tree"
    if not tree.is_dir():
        draft = tree.with_name("tree.incomplete")
        draft.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", name.stdout.strip()], cwd=ROOT, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(draft)], input=archive.stdout, check=True)
        draft.rename(tree)
    return tree


def compare_case(case: str, old: pathlib.Path, new: pathlib.Path) -> dict[str, list[str]]:
    """Comparison → the files that differ; new: a folder for this tree's runs."""
    before, mine, flags = old.parent / case, new / case, [CONFIG, *CASES[case]]
    if not (before / "report.html").is_file():  # begun or not, it goes on
        run(old, "train", *flags, f"--workdir={before}")
    run(ROOT, "train", *flags, f"--workdir={mine / 'same'}")
    cut_short(before, mine / "resumed")
    run(ROOT, "train", *flags, f"--workdir={mine / 'resumed'}")
    run(ROOT, "export", f"--checkpoint={before / 'checkpoints'}", f"--out={mine / 'export' / 'hf'}")
    found = {f"{case}/{name}": differences(before, mine / name) for name in ("same", "resumed")}
    weights = ("hf/model.safetensors", "hf/config.json")
    if digests(before, weights) != digests(mine / "export", weights):
        found[f"{case}/export"] = list(weights)
    else:
        found[f"{case}/export"] = []
    for name, files in found.items():
        print(f"{name:32s} {'DIFFERS in ' + ', '.join(files) if files else 'identical'}", flush=True)
    return found


def cut_short(before: pathlib.Path, workdir: pathlib.Path) -> None:
    """A copy of a finished run as a kill before its last alignment checkpoint would have left it."""
    shutil.copytree(before, workdir)
    shutil.rmtree(workdir / "checkpoints" / "align" / LAST)
    for name in AFTER:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in (workdir / "rollouts").glob("aligned_*"):
        path.unlink()


def compare_evaluation(case: str, old: pathlib.Path, new: pathlib.Path) -> list[str]:
    """Both trees' evaluation of the old run's export."""
    model, names = f"--model={old.parent / case / 'hf'}", ("summary.json", "rollouts")
    before, after = new / "evaluate_old", new / "evaluate"
    for tree, workdir in ((old, before), (ROOT, after)):
        run(tree, "evaluate", CONFIG, model, f"--workdir={workdir}")
    a, b = digests(before, names), digests(after, names)
    files = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    print(f"{'evaluate':32s} {'DIFFERS in ' + ', '.join(files) if files else 'identical'}", flush=True)
    return files


def run(tree: pathlib.Path, job: str, *flags: str) -> None:
    """One command of a tree, which must end well."""
    env = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"experiments.{job}", *flags]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        raise UserError(f"{' '.join(command)}: ended with {done.returncode}")


if __name__ == "__main__":
    main(sys.argv[1:])
