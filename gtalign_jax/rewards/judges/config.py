"""Which judge, and its settings: the section `config.judge`."""

import dataclasses

from gtalign_jax.errors import MAX_COUNT, in_range, increasing
from gtalign_jax.rewards.judges.http import HttpJudgeConfig

KINDS = ("", "rules", "http", "model")


@dataclasses.dataclass(frozen=True)
class JudgeConfig(HttpJudgeConfig):
    """kind: `rules`, `http`, or `model`, a model on the run's mesh; "" is http where endpoints name a server,
    else rules. The fields of HttpJudgeConfig are of `http`, those below of `model`.

    path: an HF folder or hub name. questions, answers: so many questions at a time, and rows for the answers
    to each, which share what is computed of the question. question_slots, answer_slots: sizes to pad to, in
    tokens of the judge; an answer with more has no verdict.
    """

    kind: str = ""
    path: str = ""
    questions: int = 8
    answers: int = 8
    question_slots: tuple[int, ...] = (512, 1024, 2048, 4096)
    answer_slots: tuple[int, ...] = (256, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(filter(None, KINDS))}")
        if (self.kind == "model") != bool(self.path):
            raise ValueError(f"path={self.path!r}: names the model of kind=model, and of no other")
        if self.kind in ("rules", "model") and self.endpoints:
            raise ValueError(f"endpoints: are of kind=http, not of kind={self.kind}")
        in_range(self, questions=(1, MAX_COUNT), answers=(1, MAX_COUNT))
        increasing(self, "question_slots", "answer_slots")
        if not self.question_slots or not self.answer_slots:
            raise ValueError("question_slots, answer_slots: give at least one size each")

    @property
    def chosen(self) -> str:
        """The kind, said or not."""
        return self.kind or ("http" if self.endpoints else "rules")
