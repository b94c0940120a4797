"""A self-contained page from a template: its style, its script and its data inside.

Completions are hostile input. On a page they exist only inside one JSON block in which `<`, `>` and
`&` are escaped, and the script shows them as text; the template escapes everything else, and the page's
security policy admits no script but its own and no network.
"""

import base64
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from gtalign_jax import jsonl
from gtalign_jax.evaluation.bootstrap import Estimate, digits
from gtalign_jax.evaluation.report.curves import Panel
from gtalign_jax.evaluation.report.figures import panel_svg
from gtalign_jax.game.moves import ACTIONS, USER_MOVES

PAGE = pathlib.Path(__file__).parent / "page"


def render(name: str, data: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """The page of `NAME.html`, with the script `parts.js` and `NAME.js`; data: what the script reads."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common, own, style = (
        (PAGE / file).read_text(encoding="utf-8") for file in ("parts.js", f"{name}.js", "style.css")
    )
    script = common + own
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(f"{name}.html").render(
        **context,
        data=Markup(embed_json({**data, "actions": ACTIONS, "user_moves": USER_MOVES})),
        script=Markup(script),
        style=Markup(style),
        script_hash=Markup(f"sha256-{digest}"),
    )


def charts(panels: Sequence[Panel], named: bool = True) -> list[dict[str, str]]:
    """Panels as templates take them; `named` as in `panel_svg`."""
    return [
        {"title": p.title, "about": f"{p.unit}, {p.phase}", "svg": Markup(panel_svg(p, named))}
        for p in panels
    ]


def estimate_cell(e: Estimate) -> dict[str, Any]:
    """A mean with its interval as tables show it, and the number that they are sorted by."""
    d = digits(e)
    return {"value": e["mean"], "mean": f"{e['mean']:.{d}f}", "interval": f"{e['lo']:.{d}f}–{e['hi']:.{d}f}"}


def embed_json(data: Any) -> str:
    """JSON that is inert inside a script element: no `<`, `>` or `&` is left as such."""
    text = json.dumps(jsonl.plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
