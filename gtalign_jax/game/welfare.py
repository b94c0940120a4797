"""Welfare functions (user, llm) -> W, elementwise over rewards [...] that are not negative.

All belong to the CES family ((w U^rho + (1 - w) L^rho)^(1/rho), paper section 3) or are its corners:
rho = 1 is linear, rho -> 0 Cobb-Douglas, rho -> -inf Rawlsian. Pure, jit- and vmap-able; weights and rho
may be arrays. Every derivative is finite for all U, L >= 0: where the true one is infinite (Cobb-Douglas
at a zero), it is 0. Values up to the smallest normal float count as zero.
"""

import functools

import jax
import jax.numpy as jnp

from gtalign_jax.types import Array

_SERIES = 0.1  # below this |rho log(U/L)| a series replaces a difference that would cancel


def cobb_douglas(user: Array, llm: Array, alpha: Array | float = 0.5) -> Array:
    """U^alpha L^(1 - alpha) for 0 <= alpha <= 1; 0 when a side with weight has nothing (zero-dominance)."""
    user, llm, zero = _safe(user, llm, alpha)
    value = jnp.exp(alpha * jnp.log(user) + (1.0 - alpha) * jnp.log(llm))
    return jnp.where(zero, 0.0, value)


def ces(user: Array, llm: Array, rho: Array | float, weight: Array | float = 0.5) -> Array:
    """(w U^rho + (1 - w) L^rho)^(1/rho) for 0 <= w <= 1 and any rho, infinities included.

    rho = 0 is Cobb-Douglas with alpha = w, rho = 1 linear and rho = -inf the minimum, each exactly, and
    the derivative with respect to rho is right through 0 and 1. With an empty side, W is 0 for rho <= 0
    and (w^(1/rho) U + (1 - w)^(1/rho) L) for rho > 0, whose derivative stands in for the true one there.
    """
    weight = jnp.asarray(weight, jnp.result_type(float))
    rho = jnp.asarray(rho, weight.dtype)
    finite = jnp.where(jnp.isinf(rho), 1.0, rho)
    u, v, zero = _safe(user, llm, weight)
    value = jnp.exp(_log_ces(jnp.log(u), jnp.log(v), finite, weight))
    value = jnp.where(zero, _boundary(user, llm, finite, weight), value)
    # At rho = 1 the value is the sum itself; the derivatives stay those of the formula.
    correction = jax.lax.stop_gradient(linear(user, llm, weight) - value)
    value = jnp.where(rho == 1.0, value + correction, value)
    limit = jnp.where(rho < 0, jnp.minimum(user, llm), jnp.maximum(user, llm))
    return jnp.where(jnp.isinf(rho), limit, value)


def linear(user: Array, llm: Array, weight: Array | float = 0.5) -> Array:
    """w U + (1 - w) L, the utilitarian sum."""
    return weight * user + (1.0 - weight) * llm


def user_only(user: Array, llm: Array) -> Array:
    """U, in the broadcast shape of both."""
    return jnp.broadcast_to(user, jnp.broadcast_shapes(jnp.shape(user), jnp.shape(llm)))


def llm_only(user: Array, llm: Array) -> Array:
    """L, in the broadcast shape of both."""
    return user_only(llm, user)


def rawlsian(user: Array, llm: Array) -> Array:
    """min(U, L); a tie splits the derivative between both."""
    return jnp.minimum(user, llm)


def nash_bargaining(user: Array, llm: Array, disagreement: tuple[float, float] = (0.0, 0.0)) -> Array:
    """(U - d_U)(L - d_L), gains below the disagreement point counted as 0 (two losses are no gain)."""
    gain_user, gain_llm = jnp.maximum(user - disagreement[0], 0.0), jnp.maximum(llm - disagreement[1], 0.0)
    return gain_user * gain_llm


def _safe(user: Array, llm: Array, weight: Array | float) -> tuple[Array, Array, Array]:
    """(U, L, zero): both made positive, and where a side that has weight is zero."""
    user, llm = jnp.asarray(user, jnp.result_type(float)), jnp.asarray(llm, jnp.result_type(float))
    tiny = jnp.finfo(user.dtype).tiny
    empty_user, empty_llm = user <= tiny, llm <= tiny
    zero = (empty_user & (weight > 0)) | (empty_llm & (weight < 1))
    # Where zero, the formula's result is not used: both sides are 1 so that no derivative blows up.
    return jnp.where(zero | empty_user, 1.0, user), jnp.where(zero | empty_llm, 1.0, llm), zero


def _boundary(user: Array, llm: Array, rho: Array, weight: Array) -> Array:
    """CES where one side is zero: for rho > 0 the zero's term vanishes from the sum."""
    positive = rho > 0
    power = 1.0 / jnp.where(positive, rho, 1.0)
    return jnp.where(positive, weight**power * user + (1.0 - weight) ** power * llm, 0.0)


def _log_formula(log_u: Array, log_v: Array, rho: Array, weight: Array) -> Array:
    """log W for finite rho, without overflow or cancellation.

    With D = log U - log L and t = rho D it is w log U + (1 - w) log L + D f(t) / t, f the cumulant
    generating function of a centred Bernoulli(w) variable.
    """
    delta = log_u - log_v
    mean = weight * log_u + (1.0 - weight) * log_v
    return mean + delta * _cumulant_slope(rho * delta, weight)


_log_ces = jax.custom_jvp(_log_formula)


@_log_ces.defjvp
def _log_ces_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The derivative by log U is the share w U^rho / (w U^rho + (1 - w) L^rho), exact for tiny shares."""
    log_u, log_v, rho, weight = primals
    d_log_u, d_log_v, d_rho, d_weight = tangents
    by_parameters = functools.partial(_log_formula, log_u, log_v)
    value, change = jax.jvp(by_parameters, (rho, weight), (d_rho, d_weight))
    lean = rho * (log_u - log_v) + jnp.log(weight) - jnp.log1p(-weight)
    return value, change + jax.nn.sigmoid(lean) * d_log_u + jax.nn.sigmoid(-lean) * d_log_v


def _cumulant_slope(t: Array, weight: Array) -> Array:
    """f(t) / t with f(t) = log(w e^{(1-w) t} + (1-w) e^{-w t}), f(0) = f'(0) = 0."""
    k2 = weight * (1.0 - weight)
    k3, k4 = k2 * (1.0 - 2.0 * weight), k2 * (1.0 - 6.0 * k2)
    k5 = k3 * (1.0 - 12.0 * k2)
    near = jnp.abs(t) < _SERIES
    s = jnp.where(near, t, 0.0)
    series = s * (k2 / 2 + s * (k3 / 6 + s * (k4 / 24 + s * k5 / 120)))
    far = jnp.clip(jnp.where(near, 1.0, t), -1e30, 1e30)
    size = jnp.abs(far)
    # The larger exponent is taken out: f = q |t| + log(1 - q + q e^{-|t|}), q the weight of the other side.
    q = jnp.where(far > 0, 1.0 - weight, weight)
    q = jnp.where(k2 > 0, q, 0.0)  # with all weight on one side f is 0
    closed = (q * size + jnp.log1p(q * jnp.expm1(-size))) / far
    return jnp.where(near, series, closed)
