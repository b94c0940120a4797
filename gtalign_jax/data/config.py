"""Where a run's questions come from: the section `config.data`."""

import dataclasses

from gtalign_jax.chain.prompt import INSTRUCTION, PLAIN_INSTRUCTION, SHORT_INSTRUCTION
from gtalign_jax.data.history import HISTORIES, TOO_LONG
from gtalign_jax.data.records import KINDS
from gtalign_jax.errors import INF, MAX_COUNT, MAX_SEED, in_range

EMBEDDED, PUBLISHED = "embedded", "gtalign"  # names of TFDS data sets that hold these tasks
INSTRUCTIONS = {"short": SHORT_INSTRUCTION, "full": INSTRUCTION, "plain": PLAIN_INSTRUCTION}


@dataclasses.dataclass(frozen=True)
class FieldNames:
    """What a source calls the fields that we read: a question or messages, perhaps a truth, a task, an id."""

    question: str = "question"
    messages: str = "messages"
    truth: str = "truth"
    task: str = "task"
    id: str = "id"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: `synthetic` (the embedded tasks), `gtalign` (the published parquet files under root), or a kind
    and its place: `jsonl:PATH`, `parquet:PATH`, `hub:NAME[:SUBSET]`, `tfds:NAME[:FOLDER]` (docs/data.md).

    tasks: names, or module:NAME of a `Task` of one's own (docs/tasks.md). splits: what the source calls the
    split that is trained on and the one that is held out. test_share: the part of a single file that is held
    out, by a hash of the question. fields: what the source calls its fields. instruction: the system message
    of a conversation that has none: `short`, `full`, `plain` (`chain.prompt`), a text, or "" for none.
    history: what was said before the question is written as `given`, as `turns`, or `flat`, in the user's one
    message; other than `given` the published and embedded rows become conversations under our instruction.
    too_long: `drop` a prompt that no bucket holds, or `cut` its oldest turns first, as far as it takes.
    decontaminate: leave out training rows whose prompt also stands in the test split.
    weights: of each of `tasks`, its share of the training rows, which are then shuffled and repeated by task;
    without them every row is met once an epoch. bucket_steps: the rows of so many steps are put in the order
    of their prompt buckets and then cut into batches, so that most are padded less; 1: as they come.
    workers: processes that read and tokenise ahead where training rows are streamed; 0 for a thread.
    train_per_task, test_per_task: items of each task (0: all there are). seed: of the embedded items, the
    demonstrations and the order of batches.
    """

    source: str = "synthetic"
    root: str = ""
    tasks: tuple[str, ...] = ("math", "medium", "ambig_qa", "wildguard")
    splits: tuple[str, str] = ("train", "test")
    test_share: float = 0.2
    fields: FieldNames = FieldNames()
    instruction: str = "short"
    history: str = "given"
    too_long: str = "drop"
    decontaminate: bool = False
    weights: tuple[float, ...] = ()
    bucket_steps: int = 1
    workers: int = 1
    train_per_task: int = 512
    test_per_task: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in ("synthetic", "gtalign") and not (self.kind in KINDS and self.place):
            kinds = ", ".join(f"{kind}:{place}" for kind, (place, _) in KINDS.items())
            raise ValueError(f"source={self.source!r}: must be synthetic or gtalign, or a kind of {kinds}")
        counts = (0, MAX_COUNT)
        in_range(self, train_per_task=counts, test_per_task=counts, seed=(0, MAX_SEED), test_share=(0, 1))
        in_range(self, bucket_steps=(1, 10_000), workers=(0, 1000), weights=(0, INF))
        if self.weights and (len(self.weights) != len(self.tasks) or not all(self.weights)):
            raise ValueError(f"weights={self.weights}: give one above 0 for each of tasks={self.tasks}")
        if isinstance(self.tasks, str) or len(self.tasks) > 1 and all(len(name) == 1 for name in self.tasks):
            name = "".join(self.tasks)
            raise ValueError(f"tasks={name}: write several names, or one with a comma: ('{name}',)")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks={self.tasks}: name one task or more, each once")
        for name, known in (("history", HISTORIES), ("too_long", TOO_LONG)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
        if len(self.splits) != 2 or not all(self.splits):
            raise ValueError(f"splits={self.splits}: name two, the one to train on first")

    @property
    def kind(self) -> str:
        """What comes before the colon of the source."""
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        """What comes after it."""
        return self.source.partition(":")[2]

    @property
    def embedded(self) -> bool:
        """Whether the tasks are the embedded ones."""
        return self.source == "synthetic" or self.kind == "tfds" and self.place.partition(":")[0] == EMBEDDED

    @property
    def streamed(self) -> bool:
        """Whether training rows are read as they are needed, and never all in memory."""
        return self.kind == "tfds" and not self.train_per_task

    @property
    def system(self) -> str:
        """The text of the instruction."""
        return INSTRUCTIONS.get(self.instruction, self.instruction)

    def split_name(self, split: str) -> str:
        """What the source calls our `train` or `test`."""
        return self.splits[0 if split == "train" else 1]
