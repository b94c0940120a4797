"""The config of a run as it stands in its work directory, refused when it is another's.

A work directory holds a run from its first step or evaluation on; until then its config may be mended. From
then on what does not touch the steps behind may change (`changes`), and `history` in `config.json` says what
did, after which steps.
"""

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import ml_collections

from gtalign_jax import config as config_lib
from gtalign_jax import jsonl
from gtalign_jax.errors import UserError
from gtalign_jax.files import drafts
from gtalign_jax.learning.algorithm import resolve_algorithm
from gtalign_jax.mesh import processes
from gtalign_jax.remote.client import redacted_value
from gtalign_jax.run import auto, changes

HISTORY = "history"  # what changed in mid-run
CHOSEN = "chosen"  # what was chosen for fields that said `auto`; they hold it too
RESOLVED = "resolved_algorithm"  # what an algorithm that is module:function gave, for those who only read
# Section → fields that runs once recorded, that nothing was read from, and that no longer exist.
RETIRED = {"model": ("attention", "decode_layout", "param_dtype")}
# Section → fields that runs of before do not have, with the value they then had or have now.
ADDED = {
    "data": {
        "splits": ["train", "test"],
        "test_share": 0.2,
        "fields": {name: name for name in ("question", "messages", "truth", "task", "id")},
        "instruction": "short",
        "history": "given",
        "too_long": "drop",
        "decontaminate": False,
    },
    "engine": {"patience_s": 300.0},
    "sft": {"demonstrations": "", "epochs": 0, "block_weights": [], "held_out": 0},
    "judge": {
        "kind": "",
        "path": "",
        "questions": 8,
        "answers": 8,
        "question_slots": [512, 1024, 2048, 4096],
        "answer_slots": [256, 1024],
    },
    "health": {"gap_limit": 0.02, "gap_growth": 100.0, "sft_growth": 2.0, "fluency_fall": 0.5},
}


def check_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Refuse a workdir that holds another run, or one whose config is lost, before anything is touched."""
    path = workdir / "config.json"
    if not path.is_file():
        if path.exists() or has_steps(workdir):
            raise UserError(
                f"{workdir}: holds a run without its config.json; name a new --workdir or remove this folder"
            )
        return
    changed = _changed(config, path)
    if not changed or not _holds_a_run(workdir):
        return
    recorded, done = _recorded(path), changes.steps_done(workdir)
    for change in changed:
        reason = changes.refusal(change, recorded, done)
        if reason:
            old, new = redacted_value(change.old), redacted_value(change.new)
            raise UserError(
                f"{path}: holds a run with another config.{change.field} ({old!r}, now {new!r}): {reason}; "
                f"name a new --workdir or remove the folder {workdir}"
            )


def chosen_before(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Field → value for what says `auto`, as the run in a workdir has it; none where none has made a step."""
    path, fields = workdir / "config.json", auto.asked(config)
    if not fields or not path.is_file() or not _holds_a_run(workdir):
        return {}
    recorded = _recorded(path)
    return {field: auto.value_of(recorded, field) for field in fields}


def write_chosen(config: ml_collections.ConfigDict, workdir: pathlib.Path, chosen: dict[str, Any]) -> None:
    """Record the config of a run that begins, with what was chosen for it."""
    if processes.is_main():
        path = workdir / "config.json"
        fields = jsonl.read_object(path) | json.loads(config_lib.to_json(config)) | {CHOSEN: chosen}
        jsonl.write_atomic(path, json.dumps(fields, indent=1, sort_keys=True) + "\n")


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Record the config of a run that `check_config` let pass: one that goes on as it was keeps its file.

    A run that never made a step gives way to another, and with it the starting model that it made.
    """
    path = workdir / "config.json"
    if not processes.is_main():
        return
    history: list[Any] = []
    if path.is_file():
        changed = _changed(config, path)
        if not changed:
            return
        if _holds_a_run(workdir):
            values = {each.field: [redacted_value(each.old), redacted_value(each.new)] for each in changed}
            entry = {"after": changes.steps_done(workdir), "changed": values}
            history = [*jsonl.read_object(path).get(HISTORY, []), entry]
        elif not _recorded(path).get("start", {}).get("path"):
            drafts.remove(workdir / "init")  # made as the old config said
    more: dict[str, Any] = {HISTORY: history} if history else {}
    if history and CHOSEN in (before := jsonl.read_object(path)):
        more[CHOSEN] = before[CHOSEN]
    if ":" in config.align.algorithm:
        more[RESOLVED] = dataclasses.asdict(resolve_algorithm(config.align.algorithm))
    fields = json.loads(config_lib.to_json(config)) | more
    jsonl.write_atomic(path, json.dumps(fields, indent=1, sort_keys=True) + "\n")


def has_steps(workdir: pathlib.Path) -> bool:
    """Whether a run has left a checkpoint, readable or not, or a line of metrics in a workdir."""
    marks = ("checkpoints", "checkpoints/*", "checkpoints/*/*")
    found = (path for mark in marks for path in workdir.glob(mark))
    metrics = workdir / "metrics.jsonl"
    if any(path.is_file() or path.name.isdigit() for path in found):
        return True
    return metrics.is_file() and bool(metrics.read_bytes())


def start_date(workdir: pathlib.Path) -> datetime.date:
    """The day a run was started on, kept in `date.txt`: prompts that name a date stay the same over midnight.

    Only a run whose chat template asks for it has one. Every process calls this.
    """
    path = workdir / "date.txt"

    def recorded() -> datetime.date:
        if not path.exists():
            jsonl.write_atomic(path, f"{datetime.date.today().isoformat()}\n")
        try:
            return datetime.date.fromisoformat(path.read_text(encoding="utf-8").strip())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: must be the day the run was started on, as 2026-01-31") from error

    return processes.from_main(recorded)


def _holds_a_run(workdir: pathlib.Path) -> bool:
    """Whether a workdir holds steps or an evaluation."""
    return has_steps(workdir) or any(workdir.glob("rollouts/*.jsonl"))


def _changed(config: ml_collections.ConfigDict, path: pathlib.Path) -> list[changes.Change]:
    """The fields in which a recorded config is another, with both values."""
    return list(changes.differences(_recorded(path), json.loads(config_lib.to_json(config))))


def _recorded(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a `config.json` that a config has, without those of RETIRED and with those of ADDED;
    UserError when it is not what a run writes."""
    config = jsonl.read_object(path)
    for name in (HISTORY, CHOSEN, RESOLVED):
        config.pop(name, None)
    for section, fields in RETIRED.items():
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: {section!r} must be an object; name a new --workdir or put it back")
        for field in fields:
            config.get(section, {}).pop(field, None)
    for section, values in ADDED.items():
        if section in config:
            config[section] = values | config[section]
    return config


def read_config_json(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config a run was started with; UserError when it is not there or not whole.

    An algorithm of the user's own is there as the fields that it once gave: who reads a run calls no code
    that it names.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; this is no work directory of a run")
    config = _recorded(path)
    missing = sorted({"seed", "align", "algorithm", "reward", "max_new_tokens"} - set(config))
    if missing:
        raise UserError(f"{path}: not the config of a run ({missing[0]!r} is missing); put it back")
    name = str(config["align"].get("algorithm"))
    if ":" in name:
        resolved = jsonl.read_object(path).get(RESOLVED)
        if not isinstance(resolved, dict):
            raise UserError(
                f"{path}: config.align.algorithm={name!r} is code, which is not called to read a run, and "
                f"{RESOLVED!r} is missing; run the training command again, which writes the model too"
            )
        resolved["max_tokens"] = resolved.get("max_tokens") or None  # 0: the budget of the run
        given = {field: value for field, value in config["algorithm"].items() if value is not None}
        config["align"]["algorithm"], config["algorithm"] = "grpo", resolved | given  # all fields are given
    return ml_collections.ConfigDict(config)
