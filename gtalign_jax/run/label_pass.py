"""The forward pass of a judge on the mesh: how likely it finds each label after a question and an answer.

A question is computed once for all of its answers, several questions at a time. Shapes are padded to
`config.judge.question_slots` and `answer_slots`, so few programs are ever compiled.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gtalign_jax.mesh import processes
from gtalign_jax.mesh.memory import JUDGE, LOAD_JUDGE, compile_to_fit, device_bytes, told
from gtalign_jax.mesh.sharding import batch_shards, place_batch, shard_tree, spread
from gtalign_jax.models import hf, transformer
from gtalign_jax.models.config import ModelConfig
from gtalign_jax.rewards.judges.config import JudgeConfig
from gtalign_jax.run.progress import stage
from gtalign_jax.types import Array, PromptBatch, PyTree

Tokens = tuple[int, ...]


class Asked(NamedTuple):
    """A question, with all that stands before the answer, and one answer, in tokens of the judge."""

    question: Tokens
    answer: Tokens


class Shape(NamedTuple):
    """Slots that a program pads questions and answers to."""

    question: int
    answer: int


class Group(NamedTuple):
    """A question and some answers to it."""

    question: Tokens
    answers: list[Tokens]


@functools.partial(jax.jit, static_argnums=1)
def label_logprobs(
    params: PyTree, config: ModelConfig, questions: PromptBatch, tokens: Array, length: Array, labels: Array
) -> Array:
    """log p(label) [P, G, K] float32 of the token after each answer.

    questions [P, S]; answers tokens [P, G, N] of length [P, G], one at least; labels [K]: token ids.
    """
    longer = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1)))  # a state is of the token before its column
    hidden = transformer.forward_shared(params, config, questions.tokens, questions.length, longer)
    last = jnp.take_along_axis(hidden, length[..., None, None], axis=2)[:, :, 0]
    return jax.nn.log_softmax(transformer.unembed(params, config, last))[..., labels]


@dataclasses.dataclass(frozen=True, eq=False)
class LabelPass:
    """folder, model, mesh: of the judge, whose parameters are loaded when they are first needed. labels [K]:
    token ids."""

    config: JudgeConfig
    folder: pathlib.Path
    model: ModelConfig
    mesh: Mesh
    labels: np.ndarray

    @functools.cached_property
    def params(self) -> PyTree:
        """The judge's parameters on the mesh."""
        with stage("load the judge"), told(LOAD_JUDGE):
            return hf.load_params(self.folder, self.model, self._shardings)

    @property
    def weight_bytes(self) -> float:
        """What the parameters take of a device's memory."""
        shapes = hf.abstract_params(self.model)
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._shardings
        )
        return device_bytes(placed)

    @property
    def _shardings(self) -> PyTree:
        axes = transformer.logical_axes(self.model)
        return shard_tree(axes, self.mesh, hf.abstract_params(self.model))

    def logprobs(
        self, asked: Sequence[Asked], answered: Callable[[int], None] = lambda count: None
    ) -> dict[Asked, np.ndarray]:
        """log p(label) [K] of all that fit in the slots. On several processes all ask the same.

        answered: told of how many more there are, as they come.
        """
        found: dict[Asked, np.ndarray] = {}
        with jax.set_mesh(self.mesh), told(JUDGE):
            batches = list(self._batches(asked))
            running = [label_logprobs(*self._arguments(shape, groups)) for shape, groups in batches]
            for (_, groups), values in zip(batches, running, strict=True):
                fetched = processes.fetch(values)
                answered(sum(len(group.answers) for group in groups))
                for group, rows in zip(groups, fetched, strict=False):
                    found |= {
                        Asked(group.question, answer): row
                        for answer, row in zip(group.answers, rows, strict=False)
                    }
        return found

    def compile(self, lengths: Iterable[int]) -> None:
        """Compile for questions of these lengths; UserError for a program that does not fit in memory."""
        slots = sorted({size for n in lengths if (size := fitting(n, self.config.question_slots))})
        shapes = [Shape(*sizes) for sizes in itertools.product(slots, self.config.answer_slots)]
        for i, shape in enumerate(shapes, 1):
            with stage(f"compile the judge, {i} of {len(shapes)}"), jax.set_mesh(self.mesh), told(JUDGE):
                arguments = self._arguments(shape, [])
                compile_to_fit(label_logprobs.lower(*arguments), JUDGE)
                jax.block_until_ready(label_logprobs(*arguments))

    def _batches(self, asked: Sequence[Asked]) -> Iterator[tuple[Shape, list[Group]]]:
        """Groups of a like size, as many as one program takes at a time."""
        answers: dict[Tokens, list[Tokens]] = {}
        for question, answer in asked:
            answers.setdefault(question, []).append(answer)
        sized = [each for question in answers for each in self._groups(question, answers[question])]
        sized.sort(key=lambda each: each[0])
        for shape, found in itertools.groupby(sized, key=lambda each: each[0]):
            groups = [group for _, group in found]
            for first in range(0, len(groups), self._questions):
                yield shape, groups[first : first + self._questions]

    def _groups(self, question: Tokens, answers: Sequence[Tokens]) -> Iterator[tuple[Shape, Group]]:
        """The answers that fit, the shortest first, as many as share a question at a time."""
        width, slots = fitting(len(question), self.config.question_slots), self.config.answer_slots
        rows = sorted((answer for answer in answers if fitting(len(answer), slots)), key=len) if width else []
        for first in range(0, len(rows), self.config.answers):
            part = rows[first : first + self.config.answers]
            yield Shape(width, fitting(len(part[-1]), slots)), Group(question, part)

    @property
    def _questions(self) -> int:
        """Questions at a time: as many on each device."""
        return self.config.questions + -self.config.questions % batch_shards(self.mesh)

    def _arguments(self, shape: Shape, groups: Sequence[Group]) -> tuple:
        """What `label_logprobs` is given; rows without a question or an answer hold one token."""
        rows = (self._questions, self.config.answers)
        questions = PromptBatch(np.zeros((rows[0], shape.question), np.int32), np.ones(rows[0], np.int32))
        tokens, length = np.zeros((*rows, shape.answer), np.int32), np.ones(rows, np.int32)
        for p, group in enumerate(groups):
            questions.tokens[p, : len(group.question)] = group.question
            questions.length[p] = len(group.question)
            for g, answer in enumerate(group.answers):
                tokens[p, g, : len(answer)] = answer
                length[p, g] = len(answer)
        placed = place_batch((questions, tokens, length), self.mesh)
        return self.params, self.model, *placed, spread(self.labels, self.mesh)


def fitting(length: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds a length; 0 where there is none."""
    return next((size for size in sizes if length <= size), 0)
