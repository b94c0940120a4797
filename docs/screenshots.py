"""The pictures of the documentation: what headless Chromium shows, as NAME-1280.png and NAME-380.png.

    python docs/screenshots.py page=http://127.0.0.1:8000/ runs=runs/runs.html site=build/docs/index.html

`page` is the server's page, which is asked and steered, and seen to its end; others are seen as they open.
Needs playwright (extra `test`) and `chromium` on the PATH.
"""

import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = pathlib.Path(__file__).parent / "images"
QUESTION, PRICE = "Write a funny note to thank Finn for the map.", "6"
SIZES = {1280: 900, 380: 800}


def main(pictures: list[str]) -> None:
    """Open each address (or file), and keep what is seen at each width."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        for name, _, address in (picture.partition("=") for picture in pictures):
            url = address if "://" in address else pathlib.Path(address).absolute().as_uri()
            for width, height in SIZES.items():
                page = browser.new_page(viewport={"width": width, "height": height})
                page.goto(url)
                if name == "page":
                    ask_and_steer(page)
                picture = FOLDER / f"{name}-{width}.png"
                page.screenshot(path=picture, full_page=name == "page")
                Image.open(picture).convert("RGB").quantize().save(picture, optimize=True)


def ask_and_steer(page: Page) -> None:
    """Ask the server's page, set the price, steer."""
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("The answer is complete").wait_for()
    page.get_by_label("Price, as a number").fill(PRICE)
    page.get_by_role("button", name="Steer the answer").click()
    page.get_by_text("The steered answer is complete").wait_for()


if __name__ == "__main__":
    main(sys.argv[1:])
