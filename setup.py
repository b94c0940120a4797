"""Packaging: `pip install .` for the library and the command `gtalign`, extras for tests and accelerators."""

import ast
import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
PACKAGES = ("gtalign_jax", "configs", "experiments")


def version() -> str:
    """`__version__` of the package, read from its text: nothing need be installed to build it."""
    module = ast.parse((HERE / "gtalign_jax" / "__init__.py").read_text(encoding="utf-8"))
    values = {
        ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)
    }
    return ast.literal_eval(values["__version__"])


def requirements(section: str) -> list[str]:
    """The pinned lines of requirements.txt under `# [section]`: one list, tested together."""
    lines, current = [], ""
    for raw in (HERE / "requirements.txt").read_text().splitlines():
        line = raw.strip()
        if line.startswith("# ["):
            current = line[3:-1]
        elif line and not line.startswith("#") and current == section:
            lines.append(line)
    return lines


setup(
    name="gtalign-jax",
    version=version(),
    description="Game-theoretic alignment of LLM assistants (GTAlign) in JAX and Flax",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[name + end for name in PACKAGES for end in ("", ".*")]),
    package_data={
        "gtalign_jax": ["py.typed", "**/*.html", "**/*.css", "**/*.js"],
        "experiments.peers": ["*.txt"],
    },
    entry_points={"console_scripts": ["gtalign = experiments.cli:main"]},
    # The library accepts newer releases than the tested pins; requirements.txt is what was tested.
    install_requires=[line.replace("==", ">=") for line in requirements("runtime")],
    extras_require={
        "test": requirements("test"),
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
    },
)
