"""Who may import whom: the folders stay rooms with doors, and no import goes in a circle."""

import ast
import pathlib

import pytest

import gtalign_jax

PACKAGE = pathlib.Path(gtalign_jax.__file__).parent
# What everybody may know.
COMMON = {"types", "errors", "files", "jsonl", "config"}
FIRST = {"game", "chain", "mesh", "remote"}
SECOND = {"models", "data", "rewards"}
BELOW_RUN = FIRST | SECOND | {"learning", "rollout"}
# Room or root file → the rooms it may import besides COMMON.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "files": set(),
    "jsonl": set(),
    "config": set(),
    "game": set(),
    "chain": {"game"},
    "mesh": set(),
    "remote": set(),
    "models": {"mesh"},
    "data": {"game", "chain"},
    "rewards": {"game", "chain", "remote", "data"},
    "learning": {"mesh", "models"},
    "rollout": {"game", "chain", "mesh", "remote", "models"},  # chain: the grammar, lifted to tokens
    "run": BELOW_RUN,
    "synthesis": FIRST | {"data", "rewards", "rollout", "run"},
    "evaluation": BELOW_RUN | {"run"},
    "serving": BELOW_RUN | {"run"},
    "planning": BELOW_RUN | {"run"},
    "align": BELOW_RUN | {"run"},
    "train": BELOW_RUN | {"run", "evaluation", "serving", "planning", "align"},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: pathlib.Path) -> set[str]:
    """The modules of this package that a file imports anywhere in it, `TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES)


GRAPH = {name: imported(path) - {"gtalign_jax"} for name, path in MODULES.items()}


def room(module: str) -> str:
    """First name after `gtalign_jax.`."""
    return module.split(".")[1]


def test_every_folder_and_root_file_is_a_room_of_the_design():
    assert {room(name) for name in MODULES if name != "gtalign_jax"} == set(ALLOWED)
    at_root = [path for path in PACKAGE.iterdir() if path.is_file()]
    assert len(at_root) <= 8, sorted(path.name for path in at_root)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_room_knows_only_the_rooms_below_it(name):
    mine = [module for module in GRAPH if module != "gtalign_jax" and room(module) == name]
    assert mine
    for module in mine:
        strangers = {room(other) for other in GRAPH[module]} - COMMON - ALLOWED[name] - {name}
        assert not strangers, f"{module} imports {sorted(strangers)}"


def test_what_everybody_knows_knows_nobody_else():
    for module in GRAPH:
        if module != "gtalign_jax" and room(module) in COMMON:
            assert {room(other) for other in GRAPH[module]} <= COMMON


def test_no_import_goes_in_a_circle():
    settled, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(" → ".join([*path[path.index(module) :], module]))
        if module not in settled:
            path.append(module)
            for other in sorted(GRAPH[module]):
                visit(other)
            settled.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_only_the_command_line_knows_ml_collections_flags():
    for path in PACKAGE.rglob("*.py"):
        if "config_flags" in path.read_text():
            assert path == PACKAGE / "config.py"


def test_the_step_fits_on_two_screens():
    assert len((PACKAGE / "align.py").read_text().splitlines()) <= 150


def test_functions_fit_on_a_screen():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                named = [one for one in given if one.arg not in ("self", "cls")]
                where = f"{path}:{node.lineno} {node.name}"
                assert node.end_lineno - node.lineno < 60, where
                assert len(named) <= 8, f"{where} has {len(named)} parameters"
