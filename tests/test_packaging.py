"""What an installation brings: one version, tested bounds, and every package that the code imports."""

import ast
import pathlib
import sys
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gtalign_jax

REPO = pathlib.Path(__file__).resolve().parent.parent
OURS = {"gtalign_jax", "configs", "experiments"}


def bounds(section: str = "runtime") -> dict[str, Requirement]:
    """Name to range, as setup.py's RUNTIME, SERVE or STORES says it."""
    module = ast.parse((REPO / "setup.py").read_text())
    assigned = [n for n in module.body if isinstance(n, ast.Assign)]
    (lines,) = [n.value for n in assigned if ast.unparse(n.targets[0]) == section.upper()]
    found = [Requirement(line) for line in ast.literal_eval(lines)]
    return {canonicalize_name(one.name): one for one in found}


def pins(section: str) -> dict[str, Version]:
    """Name to version under `# [section]` of requirements.txt."""
    _, _, after = (REPO / "requirements.txt").read_text().partition(f"# [{section}]\n")
    pairs = [line.split("==") for line in after.partition("# [")[0].split()]
    return {canonicalize_name(name.partition("[")[0]): Version(version) for name, version in pairs}


@pytest.mark.parametrize("section", ["runtime", "serve", "stores"])
def test_every_pin_lies_within_its_bounds(section):
    assert list(pins(section)) == list(bounds(section))
    for name, version in pins(section).items():
        assert version in bounds(section)[name].specifier, name


@pytest.mark.parametrize("section", ["runtime", "serve", "stores"])
def test_every_range_has_a_lower_and_an_upper_bound(section):
    for name, requirement in bounds(section).items():
        assert sorted(one.operator for one in requirement.specifier) == ["<", ">="], name


def test_torch_and_the_tools_are_for_tests_and_development_alone():
    apart = pins("test") | pins("dev") | pins("real") | pins("eval")
    assert {"torch", "pytest", "ruff", "mypy"} < set(apart)
    assert not set(apart) & set(bounds())


@pytest.mark.parametrize("package", ["gtalign_jax", "experiments", "configs"])
def test_every_import_is_required(package):
    known = packages_distributions()
    required = set(bounds()) | {"wandb"}  # which a run that needs it asks for
    if package == "experiments":
        # Of benchmarks, real models and standard evaluations, beside it.
        required |= {"torch", *pins("real"), *pins("eval")}
    apart = {
        REPO / "gtalign_jax/serving": set(bounds("serve")),
        REPO / "gtalign_jax/files": {*bounds("stores"), "fsspec"},  # which their clients stand on
    }
    for path in (REPO / package).rglob("*.py"):
        if path.parent.name == "peers":  # these run in environments of their own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in {name.partition(".")[0] for name in names} - OURS - sys.stdlib_module_names:
                allowed = required.union(*(names for room, names in apart.items() if room in path.parents))
                assert {canonicalize_name(one) for one in known.get(top, [top])} & allowed, f"{path}: {top}"


def test_version_and_marker_of_types():
    assert Version(gtalign_jax.__version__) >= Version("0.2.0")
    assert (pathlib.Path(gtalign_jax.__file__).parent / "py.typed").is_file()
