"""The pictures of docs/serving.md: the server's page, asked and steered in headless Chromium.

    python docs/screenshots.py http://127.0.0.1:8000/

Needs playwright (extra `test`) and `chromium` on the PATH.
"""

import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = pathlib.Path(__file__).parent / "images"
QUESTION, PRICE = "Write a funny note to thank Finn for the map.", "5"
SIZES = {1280: 900, 380: 800}


def main(address: str) -> None:
    """Ask, set the price, steer, and keep what is seen at each width."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        for width, height in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(address)
            page.get_by_label("Your question").fill(QUESTION)
            page.get_by_role("button", name="Ask", exact=True).click()
            page.get_by_text("The answer is complete").wait_for()
            page.get_by_label("Price, as a number").fill(PRICE)
            page.get_by_label("the solver").check()
            page.get_by_role("button", name="Steer the answer").click()
            page.get_by_text("The steered answer is complete").wait_for()
            picture = FOLDER / f"page-{width}.png"
            page.screenshot(path=picture, full_page=True)
            Image.open(picture).convert("RGB").quantize().save(picture, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
