"""The documentation site: `make docs`. Pages are Markdown (MyST) and notebooks, shown with the outputs that
they hold; the API pages are docstrings, which are Markdown too."""

import pathlib
import re
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import gtalign_jax  # noqa: E402 (found through the line above)

project = "gtalign-jax"
author = "the gtalign-jax authors"
copyright = "2026, the gtalign-jax authors"
release = version = gtalign_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
nb_execution_mode = "off"
nb_output_stderr = "remove"  # progress
exclude_patterns = ["launch_files"]
myst_heading_anchors = 4  # the links between pages are those that GitHub understands
html_theme = "furo"
html_title = f"gtalign-jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
autodoc_preserve_defaults = True
suppress_warnings = ["myst.header"]  # the README's part begins below its title


def as_markdown(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """A docstring as Sphinx reads it: `code` stays code, indented lines stay as they stand, and nothing else
    of reStructuredText is meant."""
    text: list[str] = []
    for line in lines:
        indented = line.startswith("    ")
        if indented and text and not text[-1].startswith("    "):
            text += ["", "::", ""]  # a literal block: formulas, tables, examples
        elif not indented and text and text[-1].startswith("    "):
            text.append("")
        text.append(line if indented else _inline(line))
    lines[:] = text


def _inline(line: str) -> str:
    """`code` as ``code``, and whatever else has a meaning escaped."""
    plain, *rest = re.split(r"`+([^`]+)`+", line)
    found = [_escaped(plain)]
    for code, after in zip(rest[::2], rest[1::2], strict=True):
        found += [f"``{code}``\\ ", _escaped(after)]
    return "".join(found)


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_|`])", r"\\\1", text)


def setup(app: object) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", as_markdown)  # type: ignore[attr-defined]
