"""What is sent of the page, without a browser."""

import http.client
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from gtalign_jax.game.pricing import POLICIES, Amounts, apply_policy
from gtalign_jax.serving.page import routes
from gtalign_jax.serving.server.access import read_keys
from gtalign_jax.serving.server.ask import Bounds

REPO = pathlib.Path(__file__).resolve().parents[3]
NAMES = ("page.html", "page.css", "dom.js", "game.js", "page.js", "solve.js", "stream.js")


def get(address, path):
    line = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=30)
    line.request("GET", path)
    answer = line.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_the_page_and_its_files_need_no_key_and_bring_a_strict_policy(scripted, tmp_path):
    (tmp_path / "keys").write_text("sk-1\n")
    with scripted(keys=read_keys(str(tmp_path / "keys"), Bounds(1, 1, ()))) as (address, _):
        for name in NAMES:
            path = "/" if name == "page.html" else f"/page/{name}"
            status, headers, body = get(address, path)
            assert (status, body) == (200, (routes.FOLDER / name).read_bytes()), name
            policy = headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self';" in policy and "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
        told = json.loads(get(address, "/page/settings.json")[2])
        assert told["with_key"] and "sk-1" not in json.dumps(told)
        assert get(address, "/page/routes.py")[0] == get(address, "/page/../page/routes.py")[0] == 404
        assert get(address, "/v1/models")[0] == 401


def test_nothing_of_the_page_comes_from_elsewhere_or_becomes_html():
    for name in NAMES:
        text = (routes.FOLDER / name).read_text()
        assert "//" not in text.replace("// ", "").replace("://", "@"), name
        assert "@" not in text.replace("@media", ""), name
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
            "style=",
        ):
            assert way not in text, (name, way)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_told_as_it_is(policy):
    amounts = Amounts((3, 2, 1), (0.1, 0.7, 0.2), (5, 0, 1))
    told = routes.settings(Bounds(1, 1, (policy,), amounts))["policies"][policy]
    payoff = np.random.default_rng(0).uniform(-5, 5, (2, 3, 2))
    for price in (0.0, 0.3, 7.0):
        made = payoff + (price != 0) * (price * np.array(told["slope"]) + np.array(told["offset"]))
        np.testing.assert_allclose(made, apply_policy(payoff, policy, price, amounts), atol=1e-12)
    assert told["about"].endswith(".") and "`" not in told["about"]


def test_an_installation_has_the_pages_files(tmp_path):
    build = ["egg_info", "-e", tmp_path, "build", "-b", tmp_path, "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=REPO, check=True, capture_output=True)
    held = {path.name for path in (tmp_path / "lib/gtalign_jax/serving/page").iterdir()}
    assert set(NAMES) < held
