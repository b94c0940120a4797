"""Per-source normalisers against float64 formulas, recorded values, and a batch sharded over devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.errors import UserError
from gtalign_jax.rewards.normalize import METHODS, normalize_scores

E = 1e-6
SLOTS, SOURCES = 512, 8


def _midrank(v):
    return np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v])


def _robust(v, pool):
    kept = np.clip(v, *np.percentile(v, [1, 99]))
    median = np.median(kept)
    mad = 1.4826 * np.median(np.abs(kept - median))
    return np.tanh((kept - median) / ((mad if mad >= E else 1.0) + E) / 2)


def _quantile(v, pool):
    rank = np.array([(v <= x).sum() - 1 for x in v])
    return np.sort(pool)[(2 * rank + 1) * (len(pool) - 1) // (2 * len(v))]


def _james(v, pool):
    own = len(v) / (len(v) + 50)
    variance = own * (v.std() + E) ** 2 + (1 - own) * (pool.std() + E) ** 2
    return (v - own * v.mean() - (1 - own) * pool.mean()) / (np.sqrt(variance) + E)


# (scores of one source, all scores) -> normalised, in float64, written from the paper's section 3.
FORMULAS = {
    "none": lambda v, pool: v,
    "zscore": lambda v, pool: (v - v.mean()) / (v.std() + E),
    "minmax": lambda v, pool: (v - v.min()) / max(np.ptp(v), E),
    "robustz": _robust,
    "cdf": lambda v, pool: 2 * (_midrank(v) - 0.5) / len(v) - 1,
    "quantile": _quantile,
    "james": _james,
    "decentralize": lambda v, pool: (v - v.mean()) / (pool.std() + E),
    "selfadapt": lambda v, pool: np.tanh((v - v.mean()) / 2),
}


def by_formula(method, scores, source, valid):
    scores = np.asarray(scores, np.float32).astype(np.float64)
    out = np.zeros(len(scores))
    for s in np.unique(source[valid]):
        mine = valid & (source == s)
        out[mine] = FORMULAS[method](scores[mine], scores[valid])
    return out


def ours(method, scores, source, valid):
    """Padded to one size, so that each method compiles once."""
    pad = SLOTS - len(scores)
    padded = np.pad(np.asarray(scores, np.float32), (0, pad), constant_values=np.nan)
    result = normalize_scores(padded, np.pad(source, (0, pad)), np.pad(valid, (0, pad)), method, SOURCES)
    assert result.dtype == jnp.float32 and not np.asarray(result)[len(scores) :].any()
    return np.asarray(result)[: len(scores)]


def test_every_method_has_a_formula_here():
    assert set(METHODS) == set(FORMULAS)


# Eighths, so that sums are exact in float32 and constant sources are exactly constant on both sides.
rows = st.tuples(st.integers(-80, 80).map(lambda n: n / 8), st.integers(0, 4), st.booleans())


@pytest.mark.parametrize("method", METHODS)
@given(st.lists(rows, min_size=1, max_size=60))
@settings(max_examples=60)
def test_formulas_hold_with_ties_gaps_and_invalid_samples(method, batch):
    scores, source, valid = (np.array(column) for column in zip(*batch, strict=True))
    source = source.astype(np.int32)
    expected = by_formula(method, scores, source, valid)
    np.testing.assert_allclose(ours(method, scores, source, valid), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_formulas_hold_on_ordinary_rewards(method):
    rng = np.random.default_rng(3)
    for size in (1, 7, 64, 500):
        scores, source = rng.uniform(0, 1, size), rng.integers(0, 5, size).astype(np.int32)
        valid = rng.uniform(size=size) < 0.9
        expected = by_formula(method, scores, source, valid)
        np.testing.assert_allclose(ours(method, scores, source, valid), expected, rtol=1e-4, atol=1e-4)


# The published code compares float64 scores with float32 statistics. Where that rounding alone decides
# (equal or nearly equal scores of a source, ties, a rank exactly on a step) its values are not those of
# the formulas; these records are left out by id. `cdf` of 016 is off by 1.1e-4 for the same reason.
ROUNDING = {
    "zscore": ["edge-007", "edge-017"],
    "minmax": ["edge-007", "edge-017"],
    "decentralize": ["edge-007", "edge-017"],
    "cdf": ["edge-007", "edge-016", "edge-017"],
    "quantile": ["015", "edge-001", "edge-010", "edge-020", "edge-021"],
    "james": [
        *("004", "006", "023", "024", "039", "edge-002", "edge-011", "edge-012", "edge-019", "edge-022"),
        *("edge-007", "edge-017", "edge-027"),
    ],
}


def _records(shared, name):
    return [json.loads(line) for line in (shared / "golden" / name).open()]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_recorded_values(shared, method):
    compared = 0
    for record in _records(shared, "normalize_golden.jsonl") + _records(
        shared, "normalize_edge_golden.jsonl"
    ):
        if record["id"].removeprefix("golden-") in ROUNDING.get(method, ()):
            continue
        expected = {**record["expected"], **record["intended"]}[method]
        names = sorted(set(record["sources"]))
        source = np.array([names.index(s) for s in record["sources"]], np.int32)
        scores = np.array([float(s) for s in record["scores"]])
        got = ours(method, scores, source, np.ones(len(scores), bool))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=record["id"])
        compared += 1
    assert compared >= 55


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_batch_gives_the_same_numbers(method):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(5)
    scores = rng.uniform(0, 1, SLOTS).round(1).astype(np.float32)
    source, valid = rng.integers(0, 5, SLOTS).astype(np.int32), rng.uniform(size=SLOTS) < 0.9
    sharded = [jax.device_put(x, sharding) for x in (scores, source, valid)]
    assert len(sharded[0].addressable_shards) == 8
    got = normalize_scores(*sharded, method, SOURCES)
    np.testing.assert_allclose(got, ours(method, scores, source, valid), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, by_formula(method, scores, source, valid), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_valid_is_all_zeros(method):
    got = ours(method, np.array([np.nan, 1.0]), np.zeros(2, np.int32), np.zeros(2, bool))
    np.testing.assert_array_equal(got, 0.0)


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(UserError, match="normalize.method='zzz': must be one of none, zscore"):
        normalize_scores(jnp.zeros(2), jnp.zeros(2, jnp.int32), jnp.ones(2, bool), "zzz", 1)
