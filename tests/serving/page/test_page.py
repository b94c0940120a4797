"""The page as people use it, in headless Chromium: a real model behind it, then answers that tests write."""

import json
import re

import numpy as np
import pytest

from gtalign_jax.chain.prompt import SHORT_INSTRUCTION, format_chain, payoff_json
from gtalign_jax.chain.solver import solver_analysis
from gtalign_jax.game.break_even import break_even
from gtalign_jax.game.moves import ACTIONS, GTALIGN, KEYS
from gtalign_jax.game.pricing import as_written, per_token
from gtalign_jax.rollout import continuous
from gtalign_jax.rollout import engine as engine_lib
from gtalign_jax.serving.server.access import Keys, read_keys
from gtalign_jax.serving.server.app import Service
from gtalign_jax.serving.server.ask import ApiError, Bounds
from gtalign_jax.serving.server.local import Local
from gtalign_jax.serving.server.parts import Part
from gtalign_jax.serving.solution import solution
from gtalign_jax.serving.splice import CLOSE

QUESTION = "When does the train leave?"
FREE = np.array([[[2, 2], [0, 0], [2.5, 2.5]]] * 2)
PAID = as_written(per_token(FREE, 4.0))
EDITED = FREE.copy()
EDITED[GTALIGN.cell("DQ_CQ")] = 5.0
SAID = {"AQ": "At noon. Which day?", "DA": "At noon.", "CQ": "Which train?"}
CHAINS = {
    name: format_chain("A guess may be wrong.", matrix, solver_analysis(matrix), SAID[name])
    for name, matrix in (("AQ", FREE), ("DA", PAID), ("CQ", EDITED))
}
NARROW, WIDE = {"width": 380, "height": 800}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def address(serving, small_engine, teach):
    """A page before a model that knows the three chains by heart, the free one best."""
    messages = [{"role": "system", "content": SHORT_INSTRUCTION}, {"role": "user", "content": QUESTION}]
    engine = small_engine([*CHAINS.values(), SHORT_INSTRUCTION, QUESTION], 320, 224)
    prompt = engine_lib.encode(engine, messages)
    rows = [
        prompt + engine_lib.encode(engine, CHAINS[name]) + list(engine.eos_ids)
        for name in ("AQ", "AQ", "DA", "CQ")
    ]
    backend = Local(continuous.open_places(engine, teach(engine, rows), 2, None, (CLOSE,)), "taught")
    with serving(Service(backend, Keys(), Bounds(224, 8, ("per_token", "subscription", "none")))) as server:
        yield "http://{}:{}/".format(*server.address)


def ask(page, question=QUESTION):
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def steer(page):
    page.get_by_role("button", name="Steer the answer").click()
    page.get_by_role("button", name="Steer the answer").wait_for()


def cell(page, player, key):
    return page.get_by_label(f"{player}: payoff of {key}")


def marked(page, mark):
    """The cells that show a mark: `.frontier`, `.chosen` or text in it."""
    boxes = page.locator("#cells td").all()
    names = [f"{move}_{action}" for move in GTALIGN.user_moves for action in ACTIONS]
    here = [box.evaluate(f"(box) => box.matches({mark!r}) || !!box.querySelector({mark!r})") for box in boxes]
    return {name for name, held in zip(names, here, strict=True) if held}


def shows(page, payoff):
    """Whether all marks of the grid are those of the library for this matrix."""
    known = solution(payoff)
    assert marked(page, ".frontier") == set(known["frontier"])
    assert marked(page, "b.nash") == set(known["nash"])
    assert marked(page, "b.chosen") == marked(page, "td.chosen") == {known["cell"]}
    assert f"recommends {known['action']}:" in page.locator("#verdict").inner_text()


def response(page, side):
    return page.locator(f"#{side} .response .text")


def test_ask_move_the_slider_edit_a_cell_and_see_the_changed_answers(address, visit):
    page = visit(address, viewport=WIDE)
    ask(page)
    page.get_by_text("it chose AQ").wait_for()
    assert response(page, "original").inner_text() == SAID["AQ"]
    assert page.locator("#shared .thinking .text").inner_text() == "A guess may be wrong."
    assert [block.inner_text() for block in page.locator("#shared h3, #original h3").all()] == [
        "thinking",
        "analyze",
        "response",
    ]
    for key in KEYS:
        llm, user = FREE[GTALIGN.cell(key)]
        assert [float(cell(page, player, key).input_value()) for player in ("LLM", "user")] == [llm, user]
    shows(page, FREE)

    page.get_by_role("slider").fill("4")
    assert page.get_by_label("Price, as a number").input_value() == "4"
    shows(page, PAID)
    steer(page)
    assert response(page, "steered").inner_text() == SAID["DA"]
    assert page.locator("#steered-note").inner_text() == "chose DA · per_token at 4"
    assert response(page, "original").inner_text() == SAID["AQ"]

    page.get_by_label("Price, as a number").fill("0")
    for player in ("user", "LLM"):
        cell(page, player, "DQ_CQ").fill("5")
    shows(page, EDITED)
    assert page.get_by_text("of another matrix or price").is_visible()
    steer(page)
    assert response(page, "steered").inner_text() == SAID["CQ"]
    assert page.locator("#steered-note").inner_text() == "chose CQ · per_token at 0 · edited by hand"
    assert not page.get_by_text("of another matrix or price").is_visible()

    page.get_by_role("button", name="Back to the model's numbers").click()
    assert float(cell(page, "user", "DQ_CQ").input_value()) == 0
    shows(page, FREE)


def test_the_break_even_is_shown_and_its_button_goes_beyond_it(address, visit):
    page = visit(address, viewport=WIDE)
    ask(page)
    page.get_by_text("it chose AQ").wait_for()
    flips = break_even(FREE, per_token, written=True)
    buttons = page.locator("#flips button")
    assert [button.inner_text() for button in buttons.all()] == [
        f"{flip.price:.3f}".rstrip("0").rstrip(".") + f" {ACTIONS[flip.before]} → {ACTIONS[flip.after]}"
        for flip in flips
    ]
    for i, flip in enumerate(flips):
        buttons.nth(i).click()
        assert f"recommends {ACTIONS[flip.after]}:" in page.locator("#verdict").inner_text()
        page.get_by_label("Price, as a number").fill(str(flip.price - 1e-3))
        assert f"recommends {ACTIONS[flip.before]}:" in page.locator("#verdict").inner_text()
    page.get_by_label("Who pays").select_option("none")
    assert page.locator("#flips").inner_text() == "No price changes the recommendation."


def test_the_solver_may_analyse(address, visit):
    page = visit(address, viewport=NARROW)
    ask(page)
    page.get_by_text("it chose AQ").wait_for()
    page.get_by_label("Price, as a number").fill("4")
    page.get_by_label("the solver").check()
    with page.expect_request("**/v1/chat/completions") as sent:
        steer(page)
    body = json.loads(sent.value.post_data)
    assert body["pricing"] == {"policy": "per_token", "price": 4, "matrix": json.loads(payoff_json(FREE))}
    assert body["analyze"] == "solver"
    assert response(page, "steered").inner_text() == SAID["DA"]


def test_the_keyboard_alone_is_enough(scripted, visit):
    def answer(request):
        return CHAINS["AQ"] if request.pricing is None else CHAINS["DA"]

    with scripted(why=answer) as (address, backend):
        page = visit(address)
        page.get_by_role("button", name="Ask", exact=True, disabled=False).wait_for()
        press = page.keyboard.press
        press("Tab")
        page.keyboard.type("why")
        press("Control+Enter")
        page.get_by_text("it chose AQ").wait_for()
        seen = []
        while not seen or seen[-1] != "steer":
            press("Tab")
            seen.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel || ''"))
            if seen[-1] == "slider":
                press("ArrowRight")
            if seen[-1] == "user: payoff of VQ_DA":
                press("ArrowUp")
            assert len(seen) < 40, seen
        press("Enter")
        page.get_by_text("it chose DA").wait_for()
        asked = backend.asked[-1]
        assert (
            asked.pricing.price > 0
            and asked.pricing.matrix[:2] == (2, 2.1)
            and asked.pricing.matrix[2:4] == (0, 0)
        )
        cells = [name for name in seen if "payoff of" in name]
        assert len(cells) == 12 and cells[0].endswith("VQ_DA") and cells[-1].endswith("DQ_AQ")
        first = [seen.index(name) for name in (cells[0], "reset", "policy", "slider", "price", "steer")]
        assert first == sorted(first)


EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=2</script><b style="position:fixed">'


def test_html_in_an_answer_never_runs(scripted, visit):
    matrix = f'{EVIL}{{"DQ_AQ": 1}}'
    said = (
        f"{EVIL}<thinking>{EVIL}</thinking><payoff>{matrix}</payoff><analyze>{EVIL}</analyze><response>{EVIL}"
    )
    with scripted(evil=said, error=ApiError(400, EVIL)) as (address, backend):
        backend.models = (EVIL,)
        page = visit(address)
        ask(page, "evil")
        page.get_by_text("nothing to steer").wait_for()
        assert page.locator("main img, main script, main b[style]").count() == 0
        texts = [text.inner_text() for text in page.locator(".block .text").all()]
        assert sorted(texts) == sorted([EVIL, EVIL, matrix, EVIL, EVIL])
        assert EVIL in page.locator("header").inner_text()
        ask(page, "error")
        page.get_by_text("The server says:").wait_for()
        assert EVIL in page.get_by_role("alert").inner_text()
        assert page.evaluate("window.hit") is None
        page.faults.clear()  # the browser logs the 400


MADE = "(tag, fields) => document.body.appendChild(Object.assign(document.createElement(tag), fields))"
WAYS = {
    "markup": "document.body.innerHTML = '<img src=x onerror=\"window.hit=1\">'",
    "a handler": "document.body.setAttribute('onclick', 'window.hit=1'), document.body.click()",
    "a script": "made('script', { text: 'window.hit=1' })",
    "a script from elsewhere": "made('script', { src: 'https://example.com/x.js' })",
    "a frame": "made('iframe', { src: 'javascript:top.hit=1' })",
    "an address": "made('a', { href: 'javascript:window.hit=1' }).click()",
    "a picture": "made('img', { src: 'https://example.com/x.png', onload() { window.hit = 1; } })",
    "a request": "fetch('https://example.com').then(() => { window.hit = 1; })",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_policy_would_stop_what_the_scripts_let_through(scripted, visit, way):
    with scripted() as (address, _):
        page = visit(address)
        page.evaluate(f"async () => {{ const made = {MADE}; try {{ await ({way}); }} catch {{}} }}")
        page.wait_for_timeout(100)
        assert page.evaluate("window.hit") is None
        assert re.search("Content Security Policy|Trusted", " ".join(page.faults))
        page.faults.clear()


def test_a_key_is_asked_for_and_kept_nowhere(scripted, visit, tmp_path):
    (tmp_path / "keys").write_text("sk-right\n")
    keys = read_keys(str(tmp_path / "keys"), Bounds(1, 1, ()))
    with scripted(keys=keys, hi=CHAINS["AQ"]) as (address, _):
        page = visit(address)
        ask(page, "hi")
        page.get_by_text("Authorization: Bearer KEY is needed").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.faults.clear()
        page.get_by_label("API key").fill("sk-right")
        ask(page, "hi")
        page.get_by_text("it chose AQ").wait_for()
        assert page.locator("#served").inner_text() == "· scripted"
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert page.context.cookies() == [] and "sk-right" not in page.url
        page.reload()
        assert page.get_by_label("API key").input_value() == ""


def test_what_goes_wrong_is_said_and_the_page_goes_on(scripted, visit):
    half = CHAINS["AQ"].partition("</payoff>")[0]
    trouble = {
        "busy": (ApiError(429, "enough to do", retry_s=7), "The server says: enough to do (in 7 s)"),
        "dies": ([Part(half), ApiError(502, "the upstream died")], "The server says: the upstream died"),
    }
    said = {name: answer for name, (answer, _) in trouble.items()}
    with scripted(**said, plain="No chain.", fine=CHAINS["AQ"]) as (address, backend):
        page = visit(address)
        for name, (_, line) in trouble.items():
            ask(page, name)
            page.get_by_text(line).wait_for()
        page.faults.clear()  # the browser logs the 429
        ask(page, "plain")
        page.get_by_text("nothing to steer").wait_for()
        assert page.locator("#original .outside .text").inner_text() == "No chain."
        assert page.get_by_role("alert").count() == 0 and not page.locator("#game").is_visible()
        ask(page, "fine")
        page.get_by_text("it chose AQ").wait_for()
        backend.said["fine"] = [
            Part(CHAINS["AQ"]),
            Part(
                finish="length",
                steering={"steered": False, "reason": "no room", "policy": "per_token", "price": 0},
            ),
        ]
        steer(page)
        note = page.locator("#steered-note")
        assert note.inner_text() == "chose AQ · not steered: no room · cut at its length limit"
        assert "warn" in note.get_attribute("class")
    ask(page, "fine")
    page.get_by_text("The server cannot be reached.").wait_for()
    page.faults.clear()


def test_stop_ends_an_answer_and_the_next_begins_anew(scripted, visit):
    half = CHAINS["AQ"].partition("</analyze>")[0]
    with scripted(long=[Part(half), *[Part(".")] * 20_000], fine=CHAINS["DA"]) as (address, _):
        page = visit(address)
        ask(page, "long")
        page.locator("#verdict").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        assert page.locator("#original .analyze").count() == 1
        ask(page, "fine")
        page.get_by_text("it chose DA").wait_for()
        assert response(page, "original").inner_text() == SAID["DA"]
        shows(page, PAID)


def test_what_is_no_number_is_marked_and_undone(scripted, visit):
    with scripted(hi=CHAINS["AQ"]) as (address, _):
        page = visit(address)
        ask(page, "hi")
        page.get_by_text("it chose AQ").wait_for()
        field = cell(page, "LLM", "VQ_DA")
        field.fill("")
        assert field.get_attribute("aria-invalid") == "true"
        shows(page, FREE)
        field.blur()
        assert field.input_value() == "2" and field.get_attribute("aria-invalid") == "false"


def test_a_game_without_an_equilibrium_in_cells_says_its_mixture(scripted, visit):
    payoff = np.array([[[1, -1], [-1, 1], [-5, -5]], [[-1, 1], [1, -1], [-5, -5]]], float)
    with scripted(hi=f"<payoff>{payoff_json(payoff)}</payoff>") as (address, _):
        page = visit(address)
        ask(page, "hi")
        mixed = page.get_by_text("No cell is an equilibrium")
        mixed.wait_for()
        assert mixed.inner_text().endswith("VQ 50 % + DQ 50 % against DA 50 % + CQ 50 %")
        assert marked(page, "b.nash") == set()


AUDIT = """() => {
  const faults = [];
  const parse = (text) => {
    const n = text.match(/[\\d.]+/g).map(Number), unit = text.startsWith("color(") ? 1 : 255;
    return [n[0] / unit, n[1] / unit, n[2] / unit, n[3] ?? 1];
  };
  const over = (top, below) => below.map((x, i) => top[3] * top[i] + (1 - top[3]) * x);
  const light = (rgb) => rgb.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => over(parse(getComputedStyle(node).backgroundColor),
    node.parentElement ? behind(node.parentElement) : [1, 1, 1]);
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const said = own || node.matches("input, textarea");
    const apart = node.closest(".unseen, option, [type=range], [type=radio]");
    if (!said || apart || !node.checkVisibility()) continue;
    const box = node.getBoundingClientRect(), around = node.parentElement.getBoundingClientRect();
    if (box.left < around.left - 1 || box.right > around.right + 1)
      faults.push(`pokes out: ${node.outerHTML.slice(0, 120)}`);
    if (box.left < 0 || box.right > innerWidth) faults.push(`outside: ${node.outerHTML.slice(0, 120)}`);
    if (node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== "inline")
      faults.push(`cut: ${node.outerHTML.slice(0, 120)}`);
    const back = behind(node), front = over(parse(getComputedStyle(node).color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)}: ${node.outerHTML.slice(0, 120)}`);
  }
  for (const node of document.querySelectorAll("input, select, textarea, button")) {
    const name = node.ariaLabel || [...(node.labels ?? [])].map((l) => l.innerText).join() || node.innerText;
    if (node.checkVisibility() && !name?.trim()) faults.push(`no name: ${node.outerHTML.slice(0, 120)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  if (new Set(ids).size < ids.length) faults.push("an id stands twice");
  if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the screen");
  return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["380", "1280"])
def test_everything_is_on_the_screen_readable_and_named(scripted, visit, viewport, scheme):
    deep = as_written(per_token(FREE, 0.04)) - 2.7
    long = format_chain("w" * 300, deep, solver_analysis(deep), "Lopadotemachoselacho" * 30)
    with scripted(hi=long) as (address, _):
        page = visit(address, viewport=viewport, color_scheme=scheme)
        assert page.evaluate(AUDIT) == []
        page.get_by_text("Settings").click()
        ask(page, "hi")
        page.get_by_text("it chose").wait_for()
        page.get_by_label("Price, as a number").fill("1.2")
        steer(page)
        assert page.evaluate(AUDIT) == []


def test_a_screen_reader_is_told_of_what_changes(scripted, visit):
    with scripted(hi=CHAINS["AQ"]) as (address, _):
        page = visit(address)
        ask(page, "hi")
        status = page.get_by_role("status")
        page.get_by_text("it chose AQ").wait_for()
        assert status.inner_text() == "The answer is complete: it chose AQ."
        field = cell(page, "user", "VQ_AQ")
        described = " ".join(
            page.locator(f"#{name}").inner_text() for name in field.get_attribute("aria-describedby").split()
        )
        assert re.search(r"chosen\s+Nash\s+on the Pareto frontier", described)
        page.get_by_role("slider").fill("4")
        assert page.locator("#slider").get_attribute("aria-valuetext") == "4, recommends DA"
        assert page.locator("#verdict").get_attribute("aria-live") == "polite"


def test_an_answer_that_its_key_prices_says_so_and_the_models_own_matrix_is_edited(scripted, visit):
    steering = {"steered": True, "policy": "per_token", "price": 4.0, "recommended": "DA"}
    steering["payoff"] = json.loads(payoff_json(FREE))
    with scripted(hi=[Part(CHAINS["DA"]), Part(finish="stop", steering=steering)]) as (address, _):
        page = visit(address)
        ask(page, "hi")
        page.get_by_text("it chose DA").wait_for()
        assert page.locator("#original-note").inner_text() == "chose DA · per_token at 4"
        shows(page, FREE)


def test_another_thinking_of_the_steered_answer_is_shown_beside_it(scripted, visit):
    def answer(request):
        return CHAINS["AQ"] if request.pricing is None else CHAINS["DA"].replace("A guess", "Another guess")

    with scripted(hi=answer) as (address, _):
        page = visit(address)
        ask(page, "hi")
        page.get_by_text("it chose AQ").wait_for()
        steer(page)
        assert page.locator("#steered .thinking .text").inner_text() == "Another guess may be wrong."
        assert page.locator("#shared .thinking .text").inner_text() == "A guess may be wrong."
