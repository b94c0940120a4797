"""The page about several runs as people use it: headless Chromium opens the file, without a server."""

import pytest

from experiments import report
from tests.evaluation.report.conftest import HOSTILE, record

WIDTHS = (1280, 380)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of two runs, the second better and of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [record(folder / "first"), record(folder / "second", shift=0.1, seed=7)]
    report.main([*map(str, runs)])
    return f"file://{folder}/runs.html"


@pytest.fixture(params=WIDTHS)
def page(request, address, visit):
    page = visit(address, viewport={"width": request.param, "height": 900})
    page.on("dialog", lambda dialog: page.faults.append(dialog.message))
    return page


def test_nothing_scrolls_sideways_and_all_parts_are_seen(page):
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    for part in ("results", "settings", "training", "items", "samples"):
        assert page.locator(f"#{part}").bounding_box()["height"] > 100
    assert page.locator("#settings tbody tr").all_inner_texts() == ["seed\t0\t7"]
    fonts = page.locator("#training svg text").evaluate_all(
        "all => all.map(t => getComputedStyle(t).fontFamily)"
    )
    assert {font.split(",")[0] for font in fonts} == {"Inter"}


def test_tables_sort_by_the_column_whose_name_is_pressed(page):
    def rows():
        return [text.split("\t")[:2] for text in page.locator("figure:visible tbody tr").all_inner_texts()]

    first, second = ["first", "sft"], ["second", "aligned"]
    assert rows()[0] == first and rows()[-1] == second
    welfare = page.locator("figure:visible").get_by_role("button", name="Welfare W")
    welfare.click()
    assert rows()[0] == second and rows()[1] == ["first", "aligned"]
    welfare.click()
    assert rows()[-1] == second
    page.locator("figure:visible").get_by_role("button", name="Run", exact=True).click()
    assert [run for run, _ in rows()] == ["first", "first", "second", "second"]
    page.get_by_role("button", name="ambig_qa", exact=True).click()
    assert page.locator("figure.results:visible figcaption").inner_text() == "ambig_qa"


def test_two_models_are_read_item_by_item(page):
    assert "better on 7, worse on 0, equal on 0" in page.locator("#i-pair").inner_text()
    chosen = [page.locator(f"#i-{side} option:checked").inner_text() for side in "ab"]
    assert chosen == ["first · aligned", "second · aligned"]
    item = page.locator("#i-list button", has_text="prompt 3")
    item.click()
    shown = page.locator("#i-item")
    assert shown.locator(".prompt").inner_text() == "prompt 3"
    assert shown.locator(".response .text").all_inner_texts() == ["Which one? 0.2", "Which one? 0.3"]
    assert shown.locator(".user dd").all_inner_texts() == ["0.630", "0.730"]
    assert shown.locator(".llm dd").all_inner_texts() == ["0.700", "0.800"]
    page.locator("#i-b").select_option("first · aligned")
    assert "the same model" in page.locator("#i-pair").inner_text()


def test_nothing_from_an_answer_runs(page):
    page.locator("#i-list button", has_text="too").click()
    assert page.locator("#i-item .prompt").inner_text().startswith("</script><script>alert(1)")
    assert page.locator("#i-item .block.broken .text").all_inner_texts() == [HOSTILE, HOSTILE]
    page.locator("#samples").get_by_label("Search").fill("onerror")
    assert page.locator("#count").inner_text() == "2 samples"
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_samples_are_found_by_run_and_words(page):
    samples = page.locator("#samples")
    samples.get_by_label("Run").select_option("second")
    samples.get_by_label("Search").fill("0.3")
    assert (
        samples.locator("#list button small").all_inner_texts()
        == ["second · math · CQ"] * 4 + ["second · ambig_qa · CQ"] * 5
    )
    samples.locator("#list button").nth(1).press("ArrowDown")
    assert samples.locator("#list button[aria-pressed=true]").count() == 1


def test_values_stand_under_the_pointer(page):
    chart = page.locator("#training svg[data-chart]").first
    chart.hover()
    assert page.locator("#training output").first.inner_text().startswith("step 9 · first 0.4 · second 0.4")
