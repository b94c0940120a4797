"""What the documentation says is there is there: pages, links, commands, flags, fields, messages."""

import ast
import doctest
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from configs import base
from experiments import cli

REPO = pathlib.Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LAUNCH = DOCS / "launch_files"
COMMAND = re.compile(r"python -m experiments\.([a-z]\w*)((?:[^`\n\\]|\\\n)*)")
STAND_INS = {"a.b", "algorithm.FIELD"}  # for whichever field is meant
SHARED = ("bench_common", "fields", "cli", "flag_checks")  # modules that other jobs' flags come from


def names(path):
    """Page names as test ids."""
    return path.name


def commands(text):
    """(job, flags) of each command in a text; what follows it in a table or a comment is not its own."""
    for job, rest in COMMAND.findall(text):
        command = re.split(r" #| \(|;|&&|\| ", rest.replace("\\\n", " "))[0]
        yield job, re.findall(r"--[\w.]+", command)


@pytest.fixture(scope="module")
def words():
    """Job to every text and keyword of its module, and of those that its flags come from."""

    def said(name):
        nodes = list(ast.walk(ast.parse((REPO / "experiments" / f"{name}.py").read_text())))
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return texts | {n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg}

    shared = set().union(*map(said, SHARED))
    return {job: said(job) | shared for job in cli.jobs()}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_is_a_job_with_these_flags(page, words):
    for job, flags in commands(page.read_text()):
        assert job in words, job
        for flag in flags:
            name = flag[2:]
            known = name == "config" or {flag, name} & words[job] or name.startswith("config.")
            assert known, f"{job} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_config_field_is_one(page):
    config = base.get_config()
    for path in set(re.findall(r"--config\.([a-z][\w.]*\w)", page.read_text())) - STAND_INS:
        value = config
        for part in path.split("."):
            assert part in value, f"config.{path}"
            value = value[part]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_config_file_is_there(page):
    for name in set(re.findall(r"configs/[\w/]+\.py", page.read_text())) - {"configs/NAME.py"}:
        assert (REPO / name).is_file(), name


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent == REPO], ids=names)
def test_links_outside_the_site_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_python_blocks_parse(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if ">>>" not in block:
            ast.parse(block)


@pytest.mark.parametrize(("page", "least"), [("game.md", 10), ("steering.md", 5)])
def test_what_a_page_shows_is_what_the_library_computes(page, least):
    tried = doctest.testfile(str(DOCS / page), module_relative=False)
    assert tried.attempted > least
    assert not tried.failed


def test_every_message_that_troubleshooting_names_is_one_of_ours():
    source = "\n".join(path.read_text() for path in (REPO / "gtalign_jax").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a text that goes on in the next line
    headings = re.findall(r"^## .*`(.+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 6
    for heading in headings:
        for part in (part.strip() for part in heading.split("…")):
            assert part.removesuffix(":") in joined, part


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="sphinx is not installed: the documentation is not built")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "game.html").read_text()
    assert "gtalign_jax.game.welfare.cobb_douglas" in page
    assert "https://" not in re.sub(r'<a [^>]*href="[^"]*"', "", page), (
        "the site asks for nothing from outside"
    )


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=names)
def test_launch_files_say_what_can_be_said(path, words):
    text = path.read_text()
    for job, flags in commands(text):
        assert all({flag, flag[2:]} & words[job] or flag.startswith("--config") for flag in flags)
    for name in re.findall(r"configs/[\w/]+\.py", text):
        assert (REPO / name).is_file()
    if path.suffix == ".yaml":
        assert yaml.safe_load(text)["name" if path.stem == "sky" else "kind"]
    elif path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
    else:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert {line.split()[0] for line in lines} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT"}
        for line in lines:
            if line.startswith("COPY"):
                *sources, _ = shlex.split(line)[1:]
                assert all((REPO / source).exists() for source in sources)
