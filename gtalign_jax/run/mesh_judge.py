"""A judge on the mesh: a model of its own, laid out as the policy, that reads and writes nothing.

A verdict is what the model makes of the rubric, the question and a response: how likely each label is as the
next token. On several hosts the model is one for all: they bring their requests together, run the same
programs, and each takes its own verdicts. So it runs between the programs of the policy, never beside them.
"""

import dataclasses
import datetime
import functools
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gtalign_jax.data.item import Item
from gtalign_jax.errors import UserError
from gtalign_jax.mesh import processes
from gtalign_jax.models import hf
from gtalign_jax.remote.counters import Counters
from gtalign_jax.rewards.judges.base import JudgeRequest, Verdict
from gtalign_jax.rewards.judges.config import JudgeConfig
from gtalign_jax.rewards.judges.labels import DIGITS, LabelPrompt, label_prompt, verdict_of
from gtalign_jax.rewards.scale import BINARY
from gtalign_jax.rewards.tasks.task import Tasks
from gtalign_jax.rollout import chat
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.folder import EngineOptions, folder_engine
from gtalign_jax.run.label_pass import Asked, LabelPass, Tokens

_PLACE = "qxzkjvresponsezkq"  # stands where the response comes


@dataclasses.dataclass(frozen=True, eq=False)
class MeshJudge:
    """A `Judge`. engine: the judge's own tokenizer, template and model. stats: where it counts."""

    config: JudgeConfig
    engine: Engine
    run: LabelPass
    tasks: Tasks
    stats: Counters

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict a request, in order. All processes call it, each with its own requests.

        UserError for a task whose rubric cannot be labelled.
        """
        started = time.monotonic()
        # An error here may be one process's own, and the others would wait for it.
        prompts = processes.on_each(lambda: [label_prompt(request, self.tasks) for request in requests])
        mine = asked(self.engine, prompts)
        every = dict.fromkeys(each for part in processes.all_gather(mine) for each in part)
        logp = self.run.logprobs(list(every), functools.partial(self.stats.add, "answers"))
        verdicts, mass = [], 0.0
        for prompt, each in zip(prompts, mine, strict=True):
            if each not in logp:
                verdicts.append(Verdict(None, self._too_long(each)))
                continue
            labels = logp[each][[DIGITS.index(label) for label in prompt.labels]]
            mass += float(np.exp(labels).sum())
            verdicts.append(verdict_of(labels, prompt.scale))
        self._count(mine, verdicts, label_mass=mass, call_s=time.monotonic() - started)
        return verdicts

    def warm_up(self, items: Iterable[Item]) -> None:
        """Load the model, and compile for all that answers to these items can need.

        UserError for what does not fit in memory.
        """
        requests = (JudgeRequest(item.task, item.intent, "", item.ground_truth, item) for item in items)
        prompts = dict.fromkeys(label_prompt(request, self.tasks) for request in requests)
        self.run.compile(len(each.question) for each in asked(self.engine, list(prompts)))

    def _too_long(self, each: Asked) -> str:
        for name, tokens in (("question_slots", each.question), ("answer_slots", each.answer)):
            if len(tokens) > (most := getattr(self.config, name)[-1]):
                return f"{len(tokens)} tokens, over the {most} of config.judge.{name}"
        raise AssertionError("what fits is judged")

    def _count(self, mine: Sequence[Asked], verdicts: Sequence[Verdict], **sums: float) -> None:
        missing = sum(verdict.score is None for verdict in verdicts)
        sums |= {"calls": 1, "requests": len(mine), "repeated": len(mine) - len(set(mine))}
        for name, count in (sums | {"missing": missing, "scored": len(mine) - missing}).items():
            self.stats.add(name, count)


def make_mesh_judge(
    config: JudgeConfig,
    options: EngineOptions,
    tasks: Tasks,
    stats: Counters,
    date: Callable[[], datetime.date] = datetime.date.today,
) -> MeshJudge:
    """The judge in the folder of a config.

    options: mesh and runtime. date: gives what a template that asks for it is told. The weights are held in
    the type they are computed in: they are not trained. Raises UserError for a folder that cannot be used,
    or a task without a rubric.
    """
    held = dataclasses.replace(options.runtime, param_dtype=options.runtime.compute_dtype, remat="none")
    folder = hf.resolve_folder(config.path)
    engine = folder_engine(folder, dataclasses.replace(options, runtime=held), chat=True)
    if chat.asks_for_date(engine.tokenizer):
        engine = dataclasses.replace(engine, date=date())
    for task in tasks.values():
        task.rubric_for("")
    assert options.mesh is not None  # a job has one
    run = LabelPass(config, folder, engine.model_config, options.mesh, label_ids(engine, folder))
    return MeshJudge(config, engine, run, tasks, stats)


def asked(engine: Engine, prompts: Sequence[LabelPrompt]) -> list[Asked]:
    """Prompts in the judge's chat template, ready to be answered, in tokens."""
    frames: dict[LabelPrompt, tuple[Tokens, str]] = {}
    found = []
    for prompt in prompts:
        key = dataclasses.replace(prompt, response="")
        if key not in frames:
            before, after = _around(engine, key)
            frames[key] = _encoded(engine, before), after
        question, after = frames[key]
        found.append(Asked(question, _encoded(engine, prompt.response + after)))
    return found


def label_ids(engine: Engine, folder: pathlib.Path) -> np.ndarray:
    """The token of each digit at the place of the verdict, [10] int32."""
    _, end = _around(engine, LabelPrompt("s", "b", "", "a", "", BINARY))
    before = _encoded(engine, end)
    after = [_encoded(engine, end + digit) for digit in DIGITS]
    ids = [tokens[len(before)] if tokens[: len(before)] == before else tokens[-1] for tokens in after]
    if len(set(ids)) < len(DIGITS):
        raise UserError(
            f"{folder}: its tokenizer has no token for each digit; name another config.judge.path"
        )
    return np.array(ids, np.int32)


def _around(engine: Engine, prompt: LabelPrompt) -> tuple[str, str]:
    """The texts before and after the response, in the judge's chat template."""
    messages = [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": f"{prompt.before}{_PLACE}{prompt.after}"},
    ]
    text = chat.render(engine.tokenizer, messages, engine.date, template=engine.template, thinks=False)
    before, _, after = text.rpartition(_PLACE)
    opened = re.fullmatch(r"<(\w+)>", engine.template.opens)  # a reasoning, which is left out
    return before, f"{after}\n</{opened[1]}>\n\n" if opened else after


def _encoded(engine: Engine, text: str) -> Tokens:
    return tuple(engine.tokenizer(text, add_special_tokens=False)["input_ids"])
