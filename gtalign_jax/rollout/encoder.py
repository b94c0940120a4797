"""Many conversations tokenised at a time: what is the same in all is done once, where that is exact."""

import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from gtalign_jax.rollout import chat, pieces, written
from gtalign_jax.rollout.engine import Engine
from gtalign_jax.rollout.template import Messages, Template, fitted


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Conversations → the token ids of each that `chat.encode_all` gives; it can be sent to another process.

    cuts: of `pieces.find_cuts`. alone: whether the chat template `written.writes_contents_alone`.
    """

    tokenizer: PreTrainedTokenizerBase
    date: datetime.date | None
    template: Template
    cuts: Mapping[str, int]
    alone: bool

    def __call__(self, conversations: Sequence[Messages]) -> list[list[int]]:
        if not conversations:
            return []
        asked = [fitted(messages, self.template) for messages in conversations]
        render = functools.partial(
            chat.render_all, self.tokenizer, date=self.date, add_generation_prompt=True
        )
        texts = written.texts(render, asked) if self.alone else render(asked)
        return pieces.encode(self.tokenizer, texts, self.cuts)


def make_encoder(engine: Engine) -> Encoder:
    """The encoder of an engine's prompts."""
    tokenizer = engine.tokenizer
    alone = bool(tokenizer.chat_template) and written.writes_contents_alone(tokenizer.get_chat_template())
    return Encoder(tokenizer, engine.date, engine.template, pieces.find_cuts(tokenizer), alone)
