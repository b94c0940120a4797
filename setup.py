"""Packaging: `pip install .` for the library and the command `gtalign`, extras for tests and accelerators."""

import ast
import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
PACKAGES = ("gtalign_jax", "configs", "experiments")

# The tests passed with the lower bounds, with the pins of requirements.txt, and with the newest releases that
# the upper bounds leave out nothing of; what comes next nobody has tried. CONTRIBUTING.md says how they are
# found. What turns answers into numbers (math-verify, sacrebleu) is kept to one minor release.
RUNTIME = [
    "jax>=0.10.2,<0.13",
    "jaxlib>=0.10.2,<0.13",
    "flax>=0.12.6,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.0,<0.13",
    "transformers>=5.0.0,<6",
    "tokenizers>=0.22.1,<0.24",
    "datasets>=4.0.0,<6",
    "tensorflow-datasets>=4.9.9,<4.10",
    "datasketch>=1.10.0,<3",
    "grain>=0.2.16,<0.3",
    "ml-collections>=1.0.0,<2",
    "absl-py>=2.3.0,<3",
    "etils>=1.15.0,<1.16",
    "safetensors>=0.6.2,<0.9",
    "huggingface-hub>=1.3.0,<3",
    "numpy>=2.2.0,<2.6",
    "ml-dtypes>=0.6.0,<0.7",
    "scipy>=1.16.0,<1.19",
    "pyarrow>=21.0.0,<27",
    "openai>=2.54.0,<4",
    "tenacity>=9.0.0,<10",
    "math-verify>=0.9.0,<0.10",
    "sympy>=1.13,<1.15",
    "sacrebleu>=2.6.0,<2.7",
    "matplotlib>=3.10.0,<4",
    "tensorboardX>=2.6.4,<3",
    "jinja2>=3.1.4,<4",
    "markupsafe>=3.0.4,<4",
    "tqdm>=4.67.0,<5",
    "psutil>=7.0.0,<8",
]
# Of the server alone.
SERVE = [
    "starlette>=1.0.0,<2",
    "uvicorn>=0.40.0,<0.55",
    "prometheus-client>=0.22.0,<0.27",
]
# Of paths on a store alone: gs:// and s3://.
STORES = [
    "gcsfs>=2026.10.0,<2026.11",
    "s3fs>=2026.9.0,<2026.10",
]


def version() -> str:
    """`__version__` of the package, read from its text: nothing need be installed to build it."""
    module = ast.parse((HERE / "gtalign_jax" / "__init__.py").read_text(encoding="utf-8"))
    values = {
        ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)
    }
    return ast.literal_eval(values["__version__"])


def pins(section: str) -> list[str]:
    """The lines of requirements.txt under `# [section]`: one list, tested together."""
    _, _, after = (HERE / "requirements.txt").read_text(encoding="utf-8").partition(f"# [{section}]\n")
    return after.partition("# [")[0].split()


setup(
    name="gtalign-jax",
    version=version(),
    description="Game-theoretic alignment of LLM assistants (GTAlign) in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[name + end for name in PACKAGES for end in ("", ".*")]),
    package_data={
        "gtalign_jax": ["py.typed", "**/*.html", "**/*.css", "**/*.js"],
        "experiments.peers": ["*.txt"],
        "experiments.standard_tasks": ["*.yaml"],
    },
    entry_points={"console_scripts": ["gtalign = experiments.cli:main"]},
    install_requires=RUNTIME,
    extras_require={
        "serve": SERVE,
        "gs": STORES[:1],
        "s3": STORES[1:],
        "test": SERVE + STORES + pins("test"),
        "dev": pins("dev"),
        "docs": pins("docs"),
        "real": [*pins("real"), *(line for line in pins("test") if line.startswith("torch=="))],
        # Without the stores: their clients and the oldest `datasets` want different fsspec.
        "oldest": [line.partition(",")[0].replace(">=", "==") for line in RUNTIME + SERVE] + pins("test"),
        "eval": pins("eval"),
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
    },
)
