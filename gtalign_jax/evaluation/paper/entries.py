"""What the paper claims and which models it takes to see: one `Entry` a table or figure, by name.

A method is the scale's config with some fields changed. Methods of several entries that change the same are
one model, trained once, whatever they are called.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

Fields = tuple[tuple[str, Any], ...]
"""Config fields, as `section.field`, and their values."""
BASE, SFT, ALIGNED = "base", "sft", "aligned"
PRICES = (0.0, 1.0, 2.0, 4.0, 8.0)  # of the steering curve, for the text of a direct answer


@dataclasses.dataclass(frozen=True)
class Method:
    """A model. change: fields of its alignment alone; cold: those that its cold start takes already; asked:
    those that its evaluation takes too, for they change what is asked. stage: `base` (not trained), `sft`, or
    `aligned`."""

    name: str
    change: Fields = ()
    cold: Fields = ()
    asked: Fields = ()
    stage: str = ALIGNED

    @property
    def start(self) -> str:
        """The folder of the cold start that it goes on from, by what that one changes; `base` is what that
        itself began with."""
        return slug("start", *_marks(self.asked, self.cold))

    def folder(self, seed: int) -> str:
        """The folder of its model's answers of a seed, and of the run that made it; only alignment has one of
        each seed."""
        if self.stage == BASE:
            return slug(BASE, *_marks(self.asked, self.cold))
        if self.stage == SFT:
            return self.start
        return slug(ALIGNED, *_marks(self.asked, self.cold, self.change), f"seed={seed}")


def slug(*parts: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^\w.+=-]+", "_", "_".join(parts))


def _marks(*fields: Fields) -> list[str]:
    return [f"{field}={value}" for each in fields for field, value in each]


@dataclasses.dataclass(frozen=True)
class Entry:
    """claim: what the paper says, in a line. kind: what is made of the models' answers (`tables.KINDS`).

    ours: the method, or row, that the claim is about; it holds where ours is better by `metric` than each of
    `rivals`. less: better is less of it. metrics: what the table shows. seeds: how many alignments of a
    method it takes, of those that are asked for (0: all). unseen: the questions are of tasks that nothing is
    trained on.
    """

    name: str
    claim: str
    kind: str = "compare"
    methods: tuple[Method, ...] = ()
    ours: str = "cobb_douglas"
    rivals: tuple[str, ...] = ()
    metric: str = "utility"
    metrics: tuple[str, ...] = ("utility", "answer_reward", "format_reward", "n_tokens")
    less: bool = False
    seeds: int = 0
    unseen: bool = False

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names) or self.rivals and not {self.ours, *self.rivals} <= set(names):
            raise ValueError(f"{self.name}: methods {names}, ours {self.ours}, rivals {self.rivals}")


def _reward(name: str, **change: Any) -> Method:
    fields = tuple((f"reward.{field}", value) for field, value in change.items())
    return Method(name, fields)


_BASE, _SFT = Method("base", stage=BASE), Method("sft", stage=SFT)
_OURS = Method("cobb_douglas")
_BY_REWARD = (_reward("user", fn="user"), _reward("llm", fn="llm"), _reward("linear", fn="linear"), _OURS)
# The reward's weights, a tenth to either side of each (paper, sensitivity).
_WEIGHTS = {
    "user_answer": 0.5,
    "user_band": 0.2,
    "user_brevity": 0.3,
    "llm_format": 0.2,
    "llm_payoff": 0.2,
    "llm_answer": 0.4,
    "llm_band": 0.2,
}
_SHIFTED = tuple(
    _reward(f"{field} {shift:+.1f}", **{field: round(weight + shift, 1)})
    for field, weight in _WEIGHTS.items()
    for shift in (-0.1, 0.1)
)
_SIZES = (32, 64)
_ROWS = (64, 256)


def _sized(width: int) -> Method:
    fields = (("model.hidden_size", width), ("model.intermediate_size", 2 * width))
    return Method(f"width {width}", cold=fields)


def _with_rows(rows: int) -> Method:
    return Method(f"{rows} a task", cold=(("data.train_per_task", rows),))


_ENTRIES = (
    Entry(
        "baselines",
        "alignment on mutual welfare beats the base model, the cold start and one-sided rewards in welfare",
        methods=(_BASE, _SFT, *_BY_REWARD),
        rivals=("base", "sft", "user", "llm", "linear"),
    ),
    Entry(
        "reward_ablation",
        "Cobb-Douglas has the highest welfare on every task (linear and user-only below it)",
        kind="by_task",
        methods=(*_BY_REWARD,),
        rivals=("user", "llm", "linear"),
    ),
    Entry(
        "pareto",
        "answers lie nearer to the joint frontier of user and LLM rewards than with one-sided rewards",
        kind="pareto",
        methods=(*_BY_REWARD,),
        rivals=("user", "llm", "linear"),
        metric="coverage",
        metrics=("coverage", "regret", "hypervolume"),
    ),
    Entry(
        "out_of_domain",
        "answers and welfare carry over to tasks that were not trained on",
        methods=(_SFT, *_BY_REWARD),
        rivals=("sft", "user", "llm", "linear"),
        unseen=True,
    ),
    Entry(
        "length",
        "answers take fewer tokens on every task than after the cold start",
        kind="by_task",
        methods=(_SFT, *_BY_REWARD),
        rivals=("sft",),
        metric="n_tokens",
        less=True,
    ),
    Entry(
        "efficiency",
        "more answer quality a token than after the cold start",
        methods=(_SFT, _OURS),
        rivals=("sft",),
        metric="answer_per_1k_tokens",
        metrics=(
            "answer_per_1k_tokens",
            "answer_per_1k_characters",
            "n_tokens",
            "characters",
            "response_share",
        ),
    ),
    Entry(
        "safety",
        "harm is refused with an alternative more often than after the cold start",
        methods=(_SFT, _OURS),
        rivals=("sft",),
        metric="safe_alternative",
        metrics=("refuses_harm", "safe_alternative", "over_refusal"),
    ),
    Entry(
        "ambiguity",
        "vague questions are met with a question more often than after the cold start",
        methods=(_SFT, _OURS),
        rivals=("sft",),
        metric="asks_when_ambiguous",
        metrics=("asks_when_ambiguous", "ambiguous_when_asks", "ambiguity_f1"),
    ),
    Entry(
        "weights",
        "a tenth more or less of any weight of the reward hardly moves coverage",
        kind="weights",
        methods=(_OURS, *_SHIFTED),
        metric="coverage",
        metrics=("coverage", "utility"),
        seeds=1,  # fourteen models for a range: what one seed moves is seen in the other tables
    ),
    Entry(
        "ces",
        "welfare is best near rho = 0 of the CES family (asked for by reviewers)",
        methods=(
            _reward("rawlsian", fn="rawlsian"),
            _reward("rho -1", fn="ces", rho=-1.0),
            _OURS,
            _reward("rho 0.5", fn="ces", rho=0.5),
            _reward("linear", fn="linear"),
        ),
        rivals=("rawlsian", "rho -1", "rho 0.5", "linear"),
    ),
    Entry(
        "chain",
        "the tagged chain answers better than plain RL on the same reward (asked for by reviewers)",
        methods=(Method("plain", asked=(("features.chain", "plain"), ("data.instruction", "plain"))), _OURS),
        rivals=("plain",),
        metric="answer_reward",
        metrics=("answer_reward", "user_reward", "n_tokens", "answer_per_1k_tokens"),
    ),
    Entry(
        "choice_rule",
        "the frontier cell of highest welfare leaves both better off than what self-interest reaches",
        kind="choice_rule",
        methods=(_OURS,),
        metrics=("cell_welfare", "llm", "user", "followed"),
    ),
    Entry(
        "steering",
        "the same model writes less where the matrix it goes on from makes text dearer",
        kind="steering",
        methods=(_OURS,),
        ours=f"price {PRICES[-1]:g}",
        metric="n_tokens",
        metrics=("steered", "DA", "CQ", "AQ", "follows", "welfare", "n_tokens", "cost"),
        less=True,
        seeds=1,
    ),
    Entry(
        "user_study",
        "people's satisfaction goes with welfare (Pearson 0.771, Spearman 0.805)",
        kind="user_study",
        methods=(_BASE, _SFT, *_BY_REWARD),
        metrics=("pearson", "spearman", "rating", "utility"),
        seeds=1,
    ),
    Entry(
        "data_size",
        "more questions give more welfare",
        methods=(*(_with_rows(rows) for rows in _ROWS), Method("all")),
        ours="all",
        rivals=tuple(f"{rows} a task" for rows in _ROWS),
    ),
    Entry(
        "sizes",
        "larger models gain more (asked for by reviewers)",
        methods=(*(_sized(width) for width in _SIZES), Method("full")),
        ours="full",
        rivals=tuple(f"width {width}" for width in _SIZES),
    ),
    Entry(
        "games",
        "RL on classic games alone oscillates and does not reach their equilibria (negative result)",
        kind="games",
        metrics=("first", "second", "reached", "moves"),
    ),
)
ENTRIES: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
