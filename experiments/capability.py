"""Standard evaluations of a model folder, before and after alignment, with lm-eval through the server:

    python -m experiments.capability --before=DIR --model=DIR [--tasks=schoolbook,arc_easy] [--out=FILE.json]

Each folder is served in turn by `experiments.serve`, and lm-eval (extra `eval`) asks the server. Tasks are
those of lm-eval, which fetches their data; those in folders named by --include; and `schoolbook` and
`story_sums`, for which nothing is fetched. Printed are means over questions with 95 % bootstrap intervals
and, with --before, the change on the same questions. FILE holds the same, and lm-eval's own results.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.peers import servers
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError, exit_on_user_error
from gtalign_jax.evaluation.bootstrap import Estimate, bootstrap_means, cell
from gtalign_jax.evaluation.paired import paired_difference
from gtalign_jax.files import drafts, paths

OURS = pathlib.Path(__file__).resolve().parent / "standard_tasks"
BEFORE, MODEL = "before", "model"
TOGETHER = 16  # prompts of one request
Results = Mapping[str, Any]  # what lm-eval reports of a model
Scores = dict[tuple[str, str], dict[int, float]]  # {(task, metric): {question: value}}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder: after alignment")
    parser.add_argument("--before", help="another one, evaluated first: the same model before it")
    parser.add_argument("--tasks", default="schoolbook", help="names divided by commas")
    parser.add_argument("--include", action="append", default=[], help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="the first so many questions of each task")
    parser.add_argument("--chat", action="store_true", help="questions go through the chat template")
    parser.add_argument("--system", help="with --chat, the system message, as the model was aligned with")
    parser.add_argument(
        "--max_tokens", type=int, default=1024, help="of a question with its answer; longer ones are cut"
    )
    parser.add_argument("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    folders = {BEFORE: flags.before, MODEL: flags.model} if flags.before else {MODEL: flags.model}
    check_flags(flags, folders)
    manager = open_tasks(flags)
    reports = {name: evaluate(folder, flags, manager) for name, folder in folders.items()}
    table = make_table({name: scores(report) for name, report in reports.items()})
    print(format_table(table, [*folders]))
    if flags.out:
        found = {"models": folders, "table": table, "lm_eval": {n: r["results"] for n, r in reports.items()}}
        jsonl.write_atomic(paths.absolute(flags.out), json.dumps(jsonl.plain(found), indent=1) + "\n")


def check_flags(flags: argparse.Namespace, folders: Mapping[str, str]) -> None:
    """UserError for what would fail only after the first model."""
    for name, folder in folders.items():
        if not (paths.local(folder, f"--{name}") / "config.json").is_file():
            raise UserError(
                f"--{name}={folder}: no config.json there; name a Hugging Face folder on this disk"
            )
    for folder in flags.include:
        if not paths.local(folder, "--include").is_dir():
            raise UserError(f"--include={folder}: no such folder")
    for name in ("limit", "max_tokens"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    if flags.system is not None and not flags.chat:
        raise UserError("--system: needs --chat, whose first message it is")
    if flags.out:
        drafts.check(flags.out, "--out")


def open_tasks(flags: argparse.Namespace) -> Any:
    """lm-eval's index of tasks; UserError for one that is not in it."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError('lm-eval is not installed: pip install "gtalign-jax[eval]"') from error
    names, folders = flags.tasks.split(","), [str(OURS), *flags.include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not {*names} <= {*manager.all_tasks}:  # the thousands of lm-eval take seconds
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=3))
            raise UserError(
                f"--tasks={name}: no such task; {f'the nearest: {near}' if near else 'see --include'}"
            )
    return manager


def evaluate(folder: str, flags: argparse.Namespace, manager: Any) -> Results:
    """lm-eval's report of a folder, which a server of its own answers for."""
    import lm_eval

    room = [f"--max_{what}_tokens={flags.max_tokens}" for what in ("prompt", "new")]
    serve = [
        *room,
        f"--rows={TOGETHER}",
        f"--max_choices={TOGETHER}",
        f"--compute_dtype={flags.compute_dtype}",
    ]
    print(f"serving {folder}", file=sys.stderr)
    try:
        with servers.ours(paths.path(folder), *serve) as server:
            return lm_eval.simple_evaluate(
                model="local-completions",
                model_args={
                    "model": "bench",
                    "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
                    "tokenizer": folder,
                    "tokenizer_backend": "huggingface",
                    "max_length": flags.max_tokens,
                    "max_retries": 1,
                    "timeout": 3600,
                },
                tasks=flags.tasks.split(","),
                task_manager=manager,
                batch_size=TOGETHER,
                limit=flags.limit,
                apply_chat_template=flags.chat,
                system_instruction=flags.system,
                bootstrap_iters=0,
            )
    except RuntimeError as error:  # the end of the server's log
        said = str(error).strip().splitlines()[-1].rpartition("error: ")[2]
        raise UserError(f"{folder}: {said}") from error
    except OSError as error:  # of the server, which says why, or of the hub
        answer = getattr(getattr(error, "response", None), "text", "")
        raise UserError(f"--tasks={flags.tasks}: {' '.join(f'{error} {answer}'.split())[:400]}") from error


def scores(report: Results) -> Scores:
    """What each question was worth, of every metric that is a mean over questions."""
    found: Scores = {}
    for task, samples in report["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric} ({sample['filter']})"
                if isinstance(sample[metric], int | float):
                    found.setdefault((task, name), {})[sample["doc_id"]] = float(sample[metric])
    return {key: values for key, values in found.items() if _is_mean(report, key, values)}


def _is_mean(report: Results, key: tuple[str, str], values: Mapping[int, float]) -> bool:
    metric, _, filtered = key[1].partition(" (")
    told = report["results"][key[0]].get(f"{metric},{filtered.removesuffix(')') or 'none'}")
    return isinstance(told, int | float) and math.isclose(told, np.mean([*values.values()]), abs_tol=1e-6)


def make_table(models: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """A row for each task and metric: {task, metric, MODEL: estimate, …, change: estimate of two models'}."""
    rows = []
    for key in models[MODEL]:
        row: dict[str, Any] = {"task": key[0], "metric": key[1]}
        for name, of_model in models.items():
            values = np.array([[value] for value in of_model[key].values()])
            (row[name],) = bootstrap_means(values)
        if BEFORE in models:
            row["change"] = _change(
                *([_lines(of_model[key])] for of_model in (models[MODEL], models[BEFORE]))
            )
        rows.append(row)
    return rows


def _lines(values: Mapping[int, float]) -> list[dict[str, Any]]:
    return [{"input": question, "value": value} for question, value in values.items()]


def _change(after: Sequence[Any], before: Sequence[Any]) -> Estimate:
    found = paired_difference(after, before, "value")
    return {"mean": found.mean, "lo": found.lo, "hi": found.hi, "p": found.p, "n": found.prompts}


def format_table(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """The table as text; `*`: the interval of a change leaves out 0."""
    shown = [["task", "metric", "n", *models, *(["change"] if BEFORE in models else [])]]
    for row in rows:
        cells = [row["task"], row["metric"], str(row[MODEL]["n"]), *(cell(row[name]) for name in models)]
        if "change" in row:
            change = row["change"]
            sure = change["lo"] > 0 or change["hi"] < 0
            cells.append(cell(change, "+") + (" *" if sure else ""))
        shown.append(cells)
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in shown
    )


if __name__ == "__main__":
    main()
