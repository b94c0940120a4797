"""Who may import whom: the folders stay rooms with doors, not one big hall."""

import ast
import pathlib

import pytest

import gtalign_jax

PACKAGE = pathlib.Path(gtalign_jax.__file__).parent
# Modules everyone may use: the shared types, the user-facing error, optimizer states, the sharding table, the
# talk of processes with each other and with servers.
COMMON = {"types", "errors", "sharding", "state", "distributed", "http_client"}
ALLOWED = {
    "game": set(),
    "chain": set(),
    "models": set(),
    "rewards": {"game", "chain"},
    "rollout": {"models", "chain"},  # chain: the grammar that constrained decoding lifts to tokens
    "rl": {"models"},
    "sft": {"models", "rl"},
    "data": {"chain", "game"},
    "reference": {"chain", "game", "rewards"},
}


def imported(path: pathlib.Path) -> set[str]:
    """First name after `gtalign_jax.` of everything a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gtalign_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "gtalign_jax" and len(name) > 1}
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_knows_only_its_neighbours(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        strangers = imported(path) - COMMON - ALLOWED[room] - {room}
        assert not strangers, f"{path.relative_to(PACKAGE)} imports {sorted(strangers)}"


def test_only_the_command_line_knows_ml_collections_flags():
    for path in PACKAGE.rglob("*.py"):
        if "config_flags" in path.read_text():
            assert path == PACKAGE / "config.py"
