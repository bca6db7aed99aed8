"""How much the auxiliary views of a teacher agree on the sampled tokens, and the weights that follow from it.

A view's log-probs are constants: weights carry no gradient. Views may come all at once or one after the other: a
`Spread` takes them as they come and needs the memory of a few [B, T] arrays, whatever the number of views.
"""

import math
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unisd_jax.losses.divergence import LOG_ZERO
from unisd_jax.losses.reduce import masked_quantile

Statistic = Literal["var", "range"]
Level = Literal["token", "sequence"]

SMALLEST_SCALE = 1e-6
SMALLEST_TOKEN_WEIGHT = 0.01
SMALLEST_SEQUENCE_WEIGHT = 1e-6


def token_agreement(
    context_logps: Float[Array, "K B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    statistic: Statistic = "var",
    quantile: float = 0.95,
    cap: float = 10.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Reliability weight and disagreement of every token.

    D = spread over the K views of log p(token), nats² for the unbiased variance ("var"), nats for max − min ("range");
    D̂ = min(D / s, cap) with s the `quantile` of D over the masked tokens, at least 1e-6; w = max(1 / (1 + gamma·D̂),
    0.01). Masked-out tokens have D = 0 and w = 1. One view cannot disagree: D = 0, with a warning. Source: UniSD Eq. 2;
    the map from D to w is the release's.

    Args:
      context_logps: log-probs of the sampled tokens under each view, at temperature 1.
      mask: the tokens of the loss.
      gamma: how strongly disagreement lowers a weight, 0 or more.
      statistic: "var" or "range".
      quantile: of the disagreement, which becomes 1.
      cap: the largest D̂.

    Returns:
      (weights, disagreement), float32.

    Raises:
      ValueError: no view, or an argument out of range.
    """
    spread = _spread_of_all(context_logps, mask, "token")
    disagreement = spread_disagreement(spread, mask, statistic=statistic, level="token")
    return token_weights(disagreement, mask, gamma=gamma, quantile=quantile, cap=cap), disagreement


def sequence_agreement(
    context_logps: Float[Array, "K B T"], mask: Bool[Array, "B T"], *, gamma: float, statistic: Statistic = "var"
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Reliability weight and disagreement of every completion.

    D = spread over the K views of the mean log-prob per token, nats² for the biased variance ("var"), nats for max −
    min ("range"); w = max(exp(−gamma·D), 1e-6). A completion without tokens has D = 0. Source: UniSD Eq. 2; the map
    from D to w is the release's.

    Raises:
      ValueError: no view, or an argument out of range.
    """
    spread = _spread_of_all(context_logps, mask, "sequence")
    disagreement = spread_disagreement(spread, mask, statistic=statistic, level="sequence")
    return sequence_weights(disagreement, gamma=gamma), disagreement


def token_weights(
    disagreement: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    quantile: float = 0.95,
    cap: float = 10.0,
) -> Float[Array, "B T"]:
    """w = max(1 / (1 + gamma·min(D / s, cap)), 0.01), see `token_agreement`; 1 at masked-out tokens.

    Raises:
      ValueError: an argument out of range.
    """
    _require_nonnegative(gamma=gamma, cap=cap)
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile is {quantile}; expected a number in [0, 1]")
    scale = jnp.maximum(masked_quantile(disagreement, mask, quantile), SMALLEST_SCALE)
    weights = jnp.maximum(1.0 / (1.0 + gamma * jnp.minimum(disagreement / scale, cap)), SMALLEST_TOKEN_WEIGHT)
    return jax.lax.stop_gradient(jnp.where(mask, weights, 1.0))


def sequence_weights(disagreement: Float[Array, "B"], *, gamma: float) -> Float[Array, "B"]:
    """w = max(exp(−gamma·D), 1e-6).

    Raises:
      ValueError: gamma is negative.
    """
    _require_nonnegative(gamma=gamma)
    return jax.lax.stop_gradient(jnp.maximum(jnp.exp(-gamma * disagreement), SMALLEST_SEQUENCE_WEIGHT))


class Spread(NamedTuple):
    """What is kept of the views seen so far: their number, mean, sum of squared deviations, smallest and largest."""

    count: Float[Array, ""]
    mean: Float[Array, "*B"]
    squares: Float[Array, "*B"]
    low: Float[Array, "*B"]
    high: Float[Array, "*B"]


def no_views(shape: tuple[int, ...]) -> Spread:
    """The spread before the first view."""
    zeros = jnp.zeros(shape, jnp.float32)
    return Spread(jnp.float32(0.0), zeros, zeros, zeros + jnp.inf, zeros - jnp.inf)


def add_views(spread: Spread, values: Float[Array, "K *B"]) -> Spread:
    """`spread` with K more views: the pairwise update of mean and squares, exact whatever the order or grouping."""
    number = values.shape[0]
    # Seen from the first view: views that are all the same have exactly their own value as mean.
    mean = values[0] + jnp.mean(values - values[0], axis=0)
    squares = jnp.sum(jnp.square(values - mean), axis=0)
    total = spread.count + number
    step = mean - spread.mean
    return Spread(
        total,
        spread.mean + step * (number / total),
        spread.squares + squares + jnp.square(step) * (spread.count * number / total),
        jnp.minimum(spread.low, jnp.min(values, axis=0)),
        jnp.maximum(spread.high, jnp.max(values, axis=0)),
    )


def view_values(
    context_logps: Float[Array, "K B T"], mask: Bool[Array, "B T"], *, level: Level
) -> Float[Array, "K *B"]:
    """What is compared between views: the log-prob of each token, or its mean over the tokens of each completion."""
    logps = jnp.where(mask, jnp.maximum(context_logps.astype(jnp.float32), LOG_ZERO), 0.0)
    if level == "token":
        return logps
    return jnp.sum(logps, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def spread_disagreement(
    spread: Spread, mask: Bool[Array, "B T"], *, statistic: Statistic, level: Level
) -> Float[Array, "*B"]:
    """Disagreement D of the views in `spread`.

    "var" divides by K − 1 at the token level and by K at the sequence level. With one view D is 0; so it is at
    masked-out tokens.

    Raises:
      ValueError: an unknown statistic.
    """
    if statistic == "var":
        divisor = jnp.maximum(spread.count - (1 if level == "token" else 0), 1.0)
        found = spread.squares / divisor
    elif statistic == "range":
        found = spread.high - spread.low
    else:
        raise ValueError(f"statistic is {statistic!r}; expected var or range")
    return jax.lax.stop_gradient(jnp.where(mask, found, 0.0) if level == "token" else found)


def _spread_of_all(context_logps, mask, level: Level) -> Spread:
    number = context_logps.shape[0]
    if number == 0:
        raise ValueError("context_logps holds no view; agreement needs at least two")
    if number == 1:
        warnings.warn("agreement of a single view is always perfect: all weights are 1", stacklevel=3)
    values = view_values(context_logps, mask, level=level)
    return add_views(no_views(values.shape[1:]), values)


def _require_nonnegative(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; expected a finite number, 0 or more")
