"""Many conversations at a time have the tokens that each has alone, whatever their chat template does."""

import copy
import dataclasses
import pickle

import hypothesis
import pytest
from hypothesis import strategies as st

from gtalign_jax.data.tokenizer import CHAT_TEMPLATE
from gtalign_jax.errors import UserError
from gtalign_jax.rollout import chat
from gtalign_jax.rollout.encoder import make_encoder
from gtalign_jax.rollout.folder import folder_engine
from gtalign_jax.rollout.written import writes_contents_alone
from tests.rollout.conftest import LLAMA3_TEMPLATE
from tests.rollout.templates import TEMPLATES, with_template

ALONE = {"smollm2", "qwen2.5", "mistral1", "phi3", "begins_twice", "ours", "joined"}
ALL = {
    **TEMPLATES,
    "ours": CHAT_TEMPLATE,
    "dated": LLAMA3_TEMPLATE,
    "joined": "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{{ m['content'] }}{% endfor %}",
    "looked_at": "{% for m in messages %}{{ m.content }}{% if m.content == 'a' %}!{% endif %}{% endfor %}",
}
contents = st.lists(
    st.sampled_from(["a", " ", "\n", "Why?", "qzvxw0zxqjk", "{{ m }}", "<|eot_id|>", "<think>", "</think>"]),
    max_size=4,
).map("".join)


def conversation(said, system):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [{"role": "system", "content": system}, *turns] if system else turns


asked = st.builds(conversation, st.lists(contents, min_size=1, max_size=3), st.sampled_from(["", "Play."]))


@pytest.fixture(scope="module")
def engines(llama3_folder):
    engine = folder_engine(llama3_folder)
    return {name: with_template(engine, text) for name, text in ALL.items()}


@pytest.mark.parametrize("name", ALL)
@hypothesis.given(talks=st.lists(asked, min_size=1, max_size=5))
@hypothesis.settings(max_examples=40)
def test_conversations_have_the_tokens_that_each_has_alone(engines, name, talks):
    engine = engines[name]
    encoder = make_encoder(engine)
    assert encoder.alone == (name in ALONE) and len(encoder.cuts) == 7

    expected = outcome(lambda: [alone(engine, talk) for talk in talks])
    assert outcome(lambda: encoder(talks)) == expected


def alone(engine, talk):
    return chat.encode_all(engine.tokenizer, [talk], engine.date, engine.template)[0]


def outcome(make):
    """What is made, or why it cannot be."""
    try:
        return make()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    "body",
    [
        "{% if loop.previtem is defined %}{{ loop.previtem.content | length }}{% endif %}{{ m.content }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% set text %}{{ m.content }}{% endset %}{{ text | trim }}",
        "{% set text = m.content %}{{ text | trim }}",
        "{% set n = m %}{{ n.content | trim }}",
        "{% macro f() %}{{ m.content }}{% endmacro %}{{ f() | trim }}",
        "{% macro f(n) %}{{ n.content | trim }}{% endmacro %}{{ f(m) }}",
        "{% for n in messages[1:] %}{{ n.content | trim }}{% endfor %}",
        "{% for n in messages if n.content %}{{ n.role }}{% endfor %}",
        "{{ m.content if m.content else 'nothing' }}",
        "{{ (m.content + ' ') | trim }}",
        "{{ m.content * 2 }}",
        "{{ m['con' + 'tent'] | trim }}",
        "{{ m.get('content') | trim }}",
        "{{ m.values() | list }}",
        "{{ m | tojson }}",
        "{{ messages | tojson }}",
        "{{ messages[0].content | trim }}",
        "{{ messages[-1].content }}",
        "{{ loop.nextitem }}",
        "{% block b scoped %}{{ m.content }}{% endblock %}{{ self.b() | trim }}",
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{{ 'qzvxw0zxqjk' + m.content }}",
    ],
)
def test_a_template_that_may_look_at_what_was_said_runs_for_each_conversation(body):
    assert not writes_contents_alone("{% for m in messages %}" + body + "{% endfor %}")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Why?", "name": "Eva"}],
        [{"role": "qzvxw0zxqjk", "content": "Why?"}],
    ],
)
def test_messages_that_say_more_than_their_content_are_written_by_the_template(engines, messages):
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    engine = dataclasses.replace(engines["ours"], tokenizer=copy.deepcopy(engines["ours"].tokenizer))
    engine.tokenizer.chat_template = template
    talks = [messages, [{"role": "user", "content": "How?"}]]
    assert make_encoder(engine)(talks) == chat.encode_all(engine.tokenizer, talks)


def test_an_encoder_can_be_sent_to_another_process(engines):
    encoder, talks = make_encoder(engines["ours"]), [conversation(["Why?"], "Play.")] * 2
    assert pickle.loads(pickle.dumps(encoder))(talks) == encoder(talks)


def test_nothing_is_made_of_nothing(engines):
    assert make_encoder(engines["ours"])([]) == []
