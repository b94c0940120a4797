"""Math answers: what counts as equal, on the published truths and on hostile input."""

import json
import os
import random
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest

from gtalign_jax.rewards.tasks import algebra, math

EQUAL = [
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    ("1,234", "1234"),
    (r"11,\!111", "11111"),
    (r"12\text{ cm}", "12"),
    (r"41.8^\circ", "41.8"),
    (r"5\%", "5"),
    ("$7", "7"),
    ("x = 5", "5"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"3\sqrt3/\pi", r"\frac{3\sqrt{3}}{\pi}"),
    (r"4.5 \times 10^{33}", "4.5e33"),
    ("4.5e33", "4.5e33"),
    ("1 + x^2", "x^2+1"),
    (r"\arcsin(10/13)", "np.arcsin(10/13)"),
    ("B", r"\text{B}"),
    (" 007", "7"),
    ("\u22125", "-5"),
    ("\uff11\uff12", "12"),
    ("\u0663", "3"),
    ("x\u00b2+1", "1 + x^2"),
    (r"1+1/\mathrm{e}", r"1+\frac{1}{e}"),
    ("-3./2", r"-\frac{3}{2}"),
    ("0.333333", r"\frac13"),
    ("3.1415927", "3.14159265"),
    (r"2^{-98}", r"\frac{1}{2^{98}}"),
    (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"),
    (r"\left( 1, 2 \right)", "(1,2)"),
]
DIFFERENT = [
    ("3", "2"),
    ("-1", "1"),
    ("(1,2)", "(2,1)"),
    ("0.51", r"\frac12"),
    ("1.6", "1.61"),
    (r"\text{A}", r"\text{B}"),
    ("x+1", "x"),
    ("", "1"),
    ("1e999", "1e998"),
    ("\u22125", "5"),
    ("\u20135", "5"),
    ("\uff11\uff12", "13"),
    ("3\u00bd", "31/2"),
    (r"1-1/\mathrm{e}", r"1+1/\mathrm{e}"),
    (r"1+\frac{7}{\badly", r"1+\frac{7}{\written"),
    ("-3./2", "-3./4"),
    ("-3./2", "-3"),
    ("12345678901", "12345678902"),
    ("12345678901.0", "12345678902"),
    (r"12345678901\sqrt{2}", r"12345678902\sqrt{2}"),
    ("2^{-98}", "2^{-99}"),
    ("(2^{-98}, 1)", "(2^{-99}, 1)"),
    ("1e-30", "2e-30"),
]


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_equal_answers(answer, truth):
    assert math.equal(answer, truth) and math.matches(f"So it is \\boxed{{{answer}}}.", truth)


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_different_answers(answer, truth):
    assert not math.equal(answer, truth)


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        (r"First \boxed{3}, no: \boxed{4}", "4", True),
        (r"First \boxed{4}, no: \boxed{3}", "4", False),
        (r"\boxed{\frac{1}{2}} and an open \boxed{7", r"\frac12", True),
        (r"\boxed{\left\{1,2\right\}}", r"\{1,2\}", True),
        ("Ann has 12 apples, so 5 are left.", "5", True),
        ("It costs 1,250 dollars.", "1250", True),
        ("The total is 5. ", "6", False),
        (r"Hence $x^2$ and so $\frac{1}{2}$ follows", r"\frac12", True),
        ("no number at all", "5", False),
        (r"\boxed{}", "5", False),
        (r"\boxed{5}", "", False),
        ("", "", False),
    ],
)
def test_the_answer_is_found(response, truth, right):
    assert math.matches(response, truth) == right


@pytest.mark.parametrize("task", ["math", "minerva_math"])
def test_published_truths_match_themselves_and_not_their_neighbours(shared, task):
    rows = pq.read_table(shared / "data" / "gtalign" / task / "test.parquet").to_pylist()
    truths = [str(row["reward_model"]["ground_truth"] or "") for row in rows]
    assert [t for t in truths if t.strip() and not math.matches(f"It is \\boxed{{{t}}}", t)] == []
    assert [t for t in truths if t.strip() and not math._tame(t)] == []
    numbers = [t for t in truths if t.replace(".", "", 1).isdigit()]
    assert len(numbers) > 100
    wrong = [
        (a, b)
        for a, b in zip(numbers, numbers[1:], strict=False)
        if math.matches(a, b) != (float(a) == float(b))
    ]
    assert wrong == []


HOSTILE = [
    r"9^{9^{9^9}}",
    r"((9^{99})^{99})^{99}",
    "2^{99999999}",
    "9**9**9**9",
    r"(2^{9999})^{9999}",
    "100000!",
    "((9!)!)!",
    r"\sqrt{" * 50,
    "(" * 299,
    "1" * 299,
    r"\frac{1}{" * 30,
    r"\sum_{k=1}^{999999999} k",
    r"\int_0^1 e^{e^{e^x}} dx",
    "\\" * 299,
    "\x00\ud800{}$",
    "x" * 10_000,
    "(1+x)^{9999}",
    "(1+x)^{4999}(1-x)^{1000}=0",
    "x^{19999}-1=0",
    "x^{4999}-1=0",
]


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("1/2", ["1/2", "0.5"], True),
        ("0.5", ["1/2", "0.5"], True),
        ("5", ["1/2", "0.5"], False),
        ("x", ["x", 7], True),
        ("7", ["x", 7], True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}", True),
        ("2", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}", False),
    ],
)
def test_a_truth_may_be_alternatives(answer, truth, equal):
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": truth}}
    for item in (math.MATH.read(row), math.MATH.read({"question": "?", "truth": truth})):
        assert math.matches(rf"So \boxed{{{answer}}}.", item.ground_truth) is equal


@pytest.mark.parametrize("answer", HOSTILE)
@pytest.mark.parametrize("threaded", [False, True])
def test_hostile_answers_are_wrong_and_quick(answer, threaded):
    """Also in a thread, where a time limit by signals cannot work."""
    math._verified.cache_clear()
    found = []
    run = lambda: found.append(math.matches(f"\\boxed{{{answer}}}", r"\frac{2}{7}"))
    before = os.times()
    if threaded:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    algebra.WORKER.stop()  # its time is counted once it has ended
    spent = sum(os.times()[:4]) - sum(before[:4])
    assert found == [False] and spent < algebra.SECONDS + 5  # and what it takes to start


def test_algebra_works_again_after_its_process_was_killed():
    assert math.equal("x + 1", "1 + x")
    child = algebra.WORKER._child
    assert child is not None
    child.kill()
    math._verified.cache_clear()
    assert not math.equal("x + 1", "x + 2")
    math._verified.cache_clear()
    assert math.equal("x + 1", "1 + x")
    assert algebra.WORKER._child is not child


def test_the_process_of_the_algebra_does_not_know_jax():
    code = (
        "import sys, gtalign_jax.rewards.tasks.algebra as a; a.compare('x','y'); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_boxes_are_found_in_linear_time():
    clock = time.process_time()
    assert math.last_boxed("\\boxed{" * 25_000) is None
    assert math.last_boxed("\\boxed{1}" + "\\boxed{" * 25_000) == "1"
    assert math.last_boxed("\\boxed{" + "{" * 100_000) is None
    assert time.process_time() - clock < 3.0


def test_random_text_never_raises():
    rng = random.Random(7)
    pieces = [
        *r"\frac \boxed{ } { ^ ( ) , . ! % $ 1 23 x \pi \sqrt \text = < ; \\ np. e".split(),
        " ",
        "\n",
        "é",
    ]
    for _ in range(300):
        answer = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        assert math.matches(answer, rng.choice(["5", r"\frac12", "x", json.dumps(answer)])) in (True, False)
