"""Where the page and its files are found, and what they are told of this server.

    /   /page/NAME          the files beside this one, which are all there is
    /page/settings.json     names, instructions, and every pricing policy as numbers

What a model writes is hostile. The scripts show it as text alone, and the policy sent with every file admits
no script but these, no style but theirs, nothing from elsewhere, and no string as HTML.
"""

import pathlib
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gtalign_jax.data.config import INSTRUCTIONS
from gtalign_jax.game.moves import ACTIONS, GTALIGN, USER_MOVES
from gtalign_jax.game.pricing import POLICIES, apply_policy
from gtalign_jax.serving.server.ask import Bounds

FOLDER = pathlib.Path(__file__).parent
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes(with_key: bool, bounds: Bounds) -> list[Route]:
    """The page's routes, none of which needs a key. with_key: whether requests need one."""
    files = [path for path in FOLDER.iterdir() if path.suffix in KINDS]
    found = [_file("/" if path.suffix == ".html" else f"/page/{path.name}", path) for path in files]
    told = {"with_key": with_key, **settings(bounds)}

    async def tell(request: Request) -> Response:
        return JSONResponse(told, headers=HEADERS)

    return [*found, Route("/page/settings.json", tell)]


def _file(address: str, path: pathlib.Path) -> Route:
    content = path.read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=KINDS[path.suffix], headers=HEADERS)

    return Route(address, send)


def settings(bounds: Bounds) -> dict[str, Any]:
    """What the scripts need to know, as JSON values.

    A policy adds offset + price x slope, both [A, 2] and nothing at a price of 0, to every row of a matrix.
    Payoffs are rounded to 1 / per_unit.
    """
    return {
        "user_moves": USER_MOVES,
        "actions": ACTIONS,
        "instructions": INSTRUCTIONS,
        "per_unit": round(1 / bounds.step),
        "policies": {name: _policy(name, bounds) for name in bounds.policies},
    }


def _policy(name: str, bounds: Bounds) -> dict[str, Any]:
    one, two = (
        np.asarray(apply_policy(np.zeros(GTALIGN.shape), name, price, bounds.amounts))[0]
        for price in (1.0, 2.0)
    )
    about = (POLICIES[name].__doc__ or "").splitlines()[0].replace("`", "")
    return {"about": about, "offset": (2 * one - two).tolist(), "slope": (two - one).tolist()}
