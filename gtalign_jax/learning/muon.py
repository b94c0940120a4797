"""Muon: steps of a kernel are its momentum made orthogonal, so that all its directions learn at one rate.

Embeddings, norms, heads and adapters are no maps between activations, and stay AdamW's.
"""

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from gtalign_jax.types import PyTree

RMS = 0.2  # of a step in units of the rate, which is about AdamW's: one rate serves both

# Input and output axes of kernels, from the end: before them are the layers.
_AXES = {
    **dict.fromkeys(("query", "key", "value"), MuonDimensionNumbers((-3,), (-2, -1))),
    "output": MuonDimensionNumbers((-3, -2), (-1,)),
    **dict.fromkeys(("gate", "up", "down"), MuonDimensionNumbers((-2,), (-1,))),
}


def muon(
    rate: optax.Schedule, betas: tuple[float, float], weight_decay: float
) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks, which decay, and AdamW with these betas for the rest.

    AdamW has Nesterov's momentum here, as in optax.
    """
    return optax.contrib.muon(
        rate,
        weight_decay=weight_decay,
        adam_learning_rate=rate,
        adam_b1=betas[0],
        adam_b2=betas[1],
        muon_weight_dimension_numbers=kernel_axes,
        consistent_rms=RMS,
    )


def kernel_axes(params: PyTree) -> PyTree:
    """For each parameter what its axes are when it is a kernel of a block, else None."""

    def of(path: tuple, _: object) -> MuonDimensionNumbers | None:
        names = [str(getattr(key, "key", "")) for key in path]
        return _AXES.get(names[-2]) if len(names) > 1 and names[-1] == "kernel" else None

    return jax.tree.map_with_path(of, params)
