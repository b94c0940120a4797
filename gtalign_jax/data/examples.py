"""Rows of TFDS data sets made into prompts and demonstrations as a stream reads them.

A maker is a value that can be sent to another process; what tokenises comes with it.
"""

import dataclasses
from collections.abc import Callable, Sequence

from gtalign_jax.data import sources
from gtalign_jax.data.builders.opened import DataSets
from gtalign_jax.data.config import DataConfig
from gtalign_jax.data.history import flattened, prompt_tokens
from gtalign_jax.data.item import Item, Message, Row
from gtalign_jax.data.loader import Demonstration, Prompt, mend_of_length
from gtalign_jax.data.sources import ReadRow
from gtalign_jax.data.stream import Changed, Left, Made
from gtalign_jax.errors import UserError

Conversation = Sequence[Message]


@dataclasses.dataclass(frozen=True)
class MakePrompts:
    """Prompts of rows by their numbers.

    encode: conversations → tokens of each. longest: tokens of the largest bucket. held_out: prompts that must
    not be trained on.
    """

    sets: DataSets
    read: ReadRow
    encode: Callable[[Sequence[Conversation]], list[list[int]]]
    config: DataConfig
    longest: int
    held_out: frozenset[tuple[str, ...]] = frozenset()

    def __call__(self, numbers: Sequence[int]) -> list[Made[Prompt]]:
        found = self._items(numbers)
        tokens = iter(self._tokens([item for item in found if isinstance(item, Item)]))
        return [self._prompt(item, *next(tokens)) if isinstance(item, Item) else item for item in found]

    def _items(self, numbers: Sequence[int]) -> list[Item | Left]:
        pairs = zip(numbers, self.sets.rows(numbers), strict=True)
        return [self._item(number, row) for number, row in pairs]

    def _item(self, number: int, row: Row) -> Item | Left:
        item = sources.read_row(row, self.read, number)
        if item is None:
            return Left(row.where, "is empty or not for its task")
        if self.held_out and sources.prompt_key(item) in self.held_out:
            return Left(row.where, "stands in the test split")
        return item

    def _tokens(self, items: Sequence[Item]) -> list[tuple[list[int], bool]]:
        """(tokens, whether its history was cut) of each prompt, all at once; one by one where a template
        refuses one, to name it."""
        write = flattened if self.config.history == "flat" else tuple
        try:
            whole = self.encode([write(item.messages) for item in items])
        except UserError:
            return [self._fitted(item) for item in items]
        if self.config.too_long == "drop":
            return [(tokens, False) for tokens in whole]
        pairs = zip(items, whole, strict=True)
        return [(tokens, False) if self._fits(tokens) else self._fitted(item) for item, tokens in pairs]

    def _fitted(self, item: Item) -> tuple[list[int], bool]:
        def encode(messages: Conversation) -> list[int]:
            return self.encode([messages])[0]

        return prompt_tokens(item, encode, self._fits, self.config.history, self.config.too_long)

    def _fits(self, tokens: Sequence[int]) -> bool:
        return 0 < len(tokens) <= self.longest

    def _prompt(self, item: Item, tokens: list[int], cut: bool) -> Made[Prompt]:
        if not self._fits(tokens):
            return Left(item.where, f"has over {self.longest} tokens ({mend_of_length(self.config)})")
        prompt = Prompt(item, tokens)
        if not cut:
            return prompt
        return Changed(prompt, item.where, f"was over {self.longest} tokens and lost its oldest turns")


@dataclasses.dataclass(frozen=True)
class MakeDemonstrations:
    """Demonstrations of rows by their numbers.

    chains: what the teacher writes for an item. encode: texts → tokens of each. end: the token that ends a
    turn. longest: tokens of a chain, its end among them.
    """

    prompts: MakePrompts
    chains: Callable[[Item], list[str]]
    encode: Callable[[list[str]], list[list[int]]]
    end: int
    longest: int

    def __call__(self, numbers: Sequence[int]) -> list[Made[Demonstration]]:
        return [self._made(row) for row in self.prompts(numbers)]

    def _made(self, row: Made[Prompt]) -> Made[Demonstration]:
        if isinstance(row, Left):
            return row
        if not isinstance(row, Changed):
            return self._shown(row)
        shown = self._shown(row.row)
        return shown if isinstance(shown, Left) else Changed(shown, row.where, row.how)

    def _shown(self, prompt: Prompt) -> Demonstration | Left:
        rows = [[*ids, self.end] for ids in self.encode(self.chains(prompt.item))]
        if any(len(row) > self.longest for row in rows):
            return Left(prompt.item.where, f"has a demonstration of over {self.longest} tokens")
        return Demonstration(prompt.tokens, rows, task=prompt.item.task)
