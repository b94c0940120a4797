"""What the surface of a text tells: word order, subject, copies."""

import random

import pyarrow.parquet as pq
import pytest

from gtalign_jax.rewards.tasks import surface

HONEST = (
    "The deepest dive was to about 10,935 metres, in the Challenger Deep. A submarine has reached 1,020.",
    "First write $a = b + 1$, so that\n\\[b^2 = 4.\\]\nHence the answer is $\\boxed{2}$.",
    "It is The Mall of America. Shall I say more about it?",
    "Los Angeles suburb",
    "I can’t help with that. Instead, I can tell you whom to call.",
    "i think the hours of the shop are on its site",
)
NONSENSE = (
    "was The to deepest metres, about dive 10,935 in the. Deep Challenger A submarine reached has 1,020.",
    "$\\boxed{2}$. is answer the Hence",
    "window pricing hello seven marble otter fallen quick brave table",
    "the the the the the the the the the the",
    "Tell me more about it now. " * 20,
    "ǻǻ ŦŦŦ ƣ Ȣ ʂʂ ɫ ɔ Ƶ ȴȴ ɇ ʥ ɠ",
)


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_reads(text):
    assert surface.reads(text) is True


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_does_not_read(text):
    assert surface.reads(text) is False


def test_one_odd_place_in_a_short_text_is_no_proof():
    assert surface.reads("The house of the is blue and it stands by the old river in our town.") is None


def test_published_texts_read_and_their_shuffled_words_do_not(shared):
    rows = pq.read_table(shared / "data" / "gtalign" / "medium" / "test.parquet").to_pylist()
    texts, rng = [row["reward_model"]["ground_truth"] for row in rows], random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in texts]
    assert sum(surface.reads(text) is not True for text in texts) <= 0.01 * len(texts)
    assert sum(surface.reads(text) is True for text in shuffled) <= 0.03 * len(texts)


LONG = "Name a river. " + " ".join(f"n{n:02}th" for n in range(99))


@pytest.mark.parametrize(
    ("text", "question", "found"),
    [
        ("Briar is the best wood for a pipe.", "What wood is best for a tobacco pipe?", True),
        ("Roses need sun, mulch, pruning, patience and compost.", "What wood is best for a pipe?", False),
        ("Briar.", "What wood is best for a pipe?", None),
        ("I'd be happy to help! Here is some useful information for you.", "What wood is best?", False),
        ("Briar.", "", True),
        ("Briar is the best wood for a pipe.", "绘制一个流程图", None),
        (
            "Boats carry iron, salt and timber along the river.",
            "Name a river. " + " ".join(f"n{n:02}th" for n in range(99)),
            None,
        ),
    ],
)
def test_a_text_is_about_what_it_shares_content_words_with(text, question, found):
    assert surface.about(text, question) is found


QUESTION = "Where does the grand canal start and finish?"


@pytest.mark.parametrize(
    ("text", "copied", "repeated"),
    [
        (QUESTION, True, True),
        (
            "You ask: where does the grand canal start and finish?",
            True,
            True,
        ),
        ("Where does the grand canal start", True, False),
        ("The grand canal starts in Beijing and ends in Hangzhou.", False, False),
        (
            "Where does the grand canal start and finish? In Beijing and in Hangzhou, says the map.",
            False,
            False,
        ),
        ("", False, False),
    ],
)
def test_a_copy_holds_little_but_the_question(text, copied, repeated):
    assert (surface.copies(text, QUESTION), surface.repeats(text, QUESTION)) == (copied, repeated)
