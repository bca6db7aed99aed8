"""The row pass: from the logits of some tokens to their scores and to the derivatives of those scores.

Every score is a sum over the vocabulary of entries e_v that depend on the logits through log p_v alone (for
0 < alpha < 1 the terms through the mixture cancel). With x_v = ∂e_v / ∂log p_v and s the student's scaled logits,
∂(Σ e)/∂s_u = x_u − p_u Σ_v x_v. That one rule gives all factors below.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands in for log 0: finite, so that 0 · log 0 is 0, and far below any float32 log-prob.
LOG_ZERO = -1e9


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the scores mean; hashable, so a static argument of jit.

    `alpha` None: there is no teacher. Logits are soft_cap · tanh(z / soft_cap) / temperature; columns from `vocab_size`
    on are padding. `entry_ceiling` caps each vocabulary entry's part of the divergence.
    """

    alpha: float | None
    temperature: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None
    entry_ceiling: float | None = None


class Normaliser(NamedTuple):
    """log Σ exp as the largest logit and the rest: subtracted one after the other, large logits keep their digits."""

    largest: jax.Array
    rest: jax.Array


class Statistics(NamedTuple):
    """What a factor's columns need beside their own logits: log Σ exp of both, and Σ_v x_v of the divergence."""

    student_normaliser: Normaliser
    teacher_normaliser: Normaliser | None
    influence: jax.Array | None


def in_one_number(statistics: Statistics) -> Statistics:
    """Statistics whose normalisers are pairs, from those of a kernel that has each as one number."""
    student, teacher, influence = statistics
    pairs = (None if x is None else Normaliser(x, jnp.zeros_like(x)) for x in (student, teacher))
    return Statistics(*pairs, influence)


class RowScores(NamedTuple):
    """One number per token, in nats; the teacher's are None without one, `entry_capped` without entry ceiling."""

    divergence: jax.Array | None
    student_logp: jax.Array
    teacher_logp: jax.Array | None
    student_entropy: jax.Array
    entry_capped: jax.Array | None = None
    statistics: Statistics | None = None


class Shard(NamedTuple):
    """Which part of the vocabulary these logits are: the mesh axes it is divided over, the id of the first column.

    `token_axes` are those over which the tokens are divided.
    """

    axes: tuple[str, ...] = ()
    offset: jax.Array | int = 0
    token_axes: tuple[str, ...] = ()

    def sum(self, values: jax.Array) -> jax.Array:
        """Sum over the whole vocabulary of [n, V] values."""
        total = jnp.sum(values, axis=-1)
        return jax.lax.psum(total, self.axes) if self.axes else total

    def sums(self, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Two sums in one reduction, as the parts of a complex number: what they share is formed once and not kept."""
        total = jnp.sum(jax.lax.complex(first, second), axis=-1)
        total = jax.lax.psum(total, self.axes) if self.axes else total
        return jnp.real(total), jnp.imag(total)

    def max(self, values: jax.Array) -> jax.Array:
        """Maximum over the whole vocabulary of [n, V] values."""
        largest = jnp.max(values, axis=-1)
        return jax.lax.pmax(largest, self.axes) if self.axes else largest


WHOLE = Shard()


def score_rows(
    student: jax.Array,
    teacher: jax.Array | None,
    targets: jax.Array,
    *,
    settings: Settings,
    wanted: tuple[str, ...] = (),
    factor_dtype=jnp.float32,
    shard: Shard = WHOLE,
) -> tuple[RowScores, dict[str, jax.Array]]:
    """Scores of n tokens from their logits, and the factors `wanted`.

    Args:
      student: [n, V] float32, hidden @ head.T.
      teacher: the same of the teacher; None where `settings.alpha` is.
      targets: [n] token ids. One outside the vocabulary gets a NaN log-prob.
      settings: what the scores mean.
      wanted: some of "divergence", "student_logp", "student_entropy".
      factor_dtype: of the factors; everything is computed in float32.
      shard: which columns of the vocabulary these are.

    Returns:
      (scores, factors). A factor is temperature · ∂score/∂student, [n, V], not yet multiplied by any weight.
    """
    scaled, _ = scale(student, settings, shard)
    normaliser = log_normaliser(scaled, shard)
    ls = log_probs(scaled, normaliser)
    teacher_normaliser = divergence = influence = capped = teacher_logp = None
    if teacher is None:
        entropy = shard.sum(-jnp.exp(ls) * ls)
    else:
        teacher_scaled, _ = scale(teacher, settings, shard)
        teacher_normaliser = log_normaliser(teacher_scaled, shard)
        terms = divergence_terms(ls, log_probs(teacher_scaled, teacher_normaliser), settings)
        if settings.alpha in (0, 1) and settings.entry_ceiling is None:
            divergence, entropy = shard.sums(terms.entries, -terms.p * ls)
            # Σ −q, and Σ p (1 + log(p/q)).
            influence = jnp.full_like(divergence, -1.0) if settings.alpha == 0 else 1 + divergence
        else:
            divergence, influence = shard.sums(terms.entries, terms.influence)
            entropy = shard.sum(-jnp.exp(ls) * ls)
        if settings.entry_ceiling is not None:
            capped = shard.sum(terms.capped.astype(jnp.float32)) > 0
        teacher_logp = subtract(at_targets(teacher_scaled, targets, settings, shard), teacher_normaliser)
    statistics = Statistics(normaliser, teacher_normaliser, influence)
    student_logp = subtract(at_targets(scaled, targets, settings, shard), normaliser)
    scores = RowScores(divergence, student_logp, teacher_logp, entropy, capped, statistics)
    options = {"settings": settings, "wanted": wanted, "shard": shard}
    # Behind the barrier the factors are formed from the logits again. Shared with the sums above, their parts would be
    # kept as [n, V] arrays of their own, which is more memory and more traffic.
    student, teacher, sums = jax.lax.optimization_barrier((student, teacher, scores))
    return scores, factors(student, teacher, targets, sums, factor_dtype=factor_dtype, **options)


def factors(
    student: jax.Array,
    teacher: jax.Array | None,
    targets: jax.Array,
    scores: RowScores,
    *,
    settings: Settings,
    wanted: tuple[str, ...],
    factor_dtype,
    shard: Shard = WHOLE,
) -> dict[str, jax.Array]:
    """The factors of some columns, whatever part of the vocabulary `scores` and their statistics were summed over."""
    scaled, slope = scale(student, settings, shard)
    ls, found = log_probs(scaled, scores.statistics.student_normaliser), {}
    if "divergence" in wanted:
        lt = log_probs(scale(teacher, settings, shard)[0], scores.statistics.teacher_normaliser)
        terms = divergence_terms(ls, lt, settings)
        found["divergence"] = terms.influence - terms.p * scores.statistics.influence[:, None]
    if "student_logp" in wanted:
        found["student_logp"] = (columns(student.shape[-1], shard) == targets[:, None]) - jnp.exp(ls)
    if "student_entropy" in wanted:
        found["student_entropy"] = -jnp.exp(ls) * (ls + scores.student_entropy[:, None])
    return {name: (factor * slope).astype(factor_dtype) for name, factor in found.items()}


def log_normaliser(scaled: jax.Array, shard: Shard = WHOLE) -> Normaliser:
    """log Σ exp over the whole vocabulary, [n]."""
    largest = shard.max(scaled)
    return Normaliser(largest, jnp.log(shard.sum(jnp.exp(scaled - largest[:, None]))))


def log_probs(scaled: jax.Array, normaliser: Normaliser) -> jax.Array:
    """Log-probs of [n, V] scaled logits; log 0 is `LOG_ZERO`."""
    return jnp.maximum(subtract(scaled, jax.tree.map(lambda x: x[:, None], normaliser)), LOG_ZERO)


def subtract(scaled: jax.Array, normaliser: Normaliser) -> jax.Array:
    """scaled − log Σ exp."""
    return (scaled - normaliser.largest) - normaliser.rest


def scale(logits: jax.Array, settings: Settings, shard: Shard = WHOLE) -> tuple[jax.Array, jax.Array | float]:
    """Logits under soft-cap and temperature, −inf on padding, and temperature times their derivative."""
    slope: jax.Array | float = 1.0
    if settings.soft_cap is not None:
        squashed = jnp.tanh(logits / settings.soft_cap)
        logits, slope = settings.soft_cap * squashed, 1 - squashed**2
    logits = logits / settings.temperature
    if settings.vocab_size is not None:
        logits = jnp.where(columns(logits.shape[-1], shard) < settings.vocab_size, logits, -jnp.inf)
    return logits, slope


class DivergenceTerms(NamedTuple):
    """Per vocabulary entry, [n, V]: e, x = ∂e/∂log p, the student's p, and whether the entry ceiling caps e."""

    entries: jax.Array
    influence: jax.Array
    p: jax.Array
    capped: jax.Array | None


def divergence_terms(ls: jax.Array, lt: jax.Array, settings: Settings) -> DivergenceTerms:
    """Entries of the divergence between p = exp(ls) and q = exp(lt), written so that none loses its digits.

    * alpha = 0: e = q log(q/p), x = −q
    * alpha = 1: e = p log(p/q), x = p (1 + log(p/q))
    * between, with m = (1−alpha) p + alpha q: e = alpha q log(q/m) + (1−alpha) p log(p/m), x = (1−alpha) p log(p/m)
    """
    alpha, gap = settings.alpha, ls - lt
    ahead, fall = gap >= 0, -jnp.abs(gap)
    # The smaller of p and q from the larger, and their difference from expm1: where the two are close, the sum is far
    # smaller than its entries, and errors of p and q that had nothing to do with each other would remain.
    larger, ratio = jnp.exp(jnp.maximum(ls, lt)), _expm1(fall)
    smaller = larger * (1 + ratio)
    p, q = jnp.where(ahead, larger, smaller), jnp.where(ahead, smaller, larger)
    if alpha == 0 or alpha == 1:
        p_minus_q = jnp.where(ahead, -larger, larger) * ratio
        entries, influence = (-q * gap, -q) if alpha == 0 else (p * gap, p * (1 + gap))
        # Without a cap the differences add up to 0, and the sum no longer depends on the normalisers' rounding.
        vanishing = p_minus_q if alpha == 0 else -p_minus_q
    else:
        above, below = _log_over_mixture(fall, ratio, jnp.where(ahead, alpha, 1 - alpha))
        log_p_over_m, log_q_over_m = jnp.where(ahead, above, below), jnp.where(ahead, below, above)
        influence = (1 - alpha) * p * log_p_over_m
        entries, vanishing = alpha * q * log_q_over_m + influence, 0.0
    if settings.entry_ceiling is None:
        return DivergenceTerms(entries + vanishing, influence, p, None)
    capped = entries > settings.entry_ceiling
    entries = jnp.where(capped, settings.entry_ceiling, entries)
    return DivergenceTerms(entries, jnp.where(capped, 0.0, influence), p, capped)


def _log_over_mixture(fall: jax.Array, ratio: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log(larger/m) and log(smaller/m) for m = larger · (1 + share · ratio), smaller = larger · (1 + ratio).

    `fall` is log(smaller/larger). Near 0 both are of the order of `fall` while what is looked for is of the order of
    its square, so there they come from a series of their own and not from a difference of logarithms.
    """
    above = -jnp.log(1 + share * ratio)
    near_above = -_double_artanh(share * ratio / (2 + share * ratio))
    near_below = _double_artanh((1 - share) * ratio / (2 + (1 + share) * ratio))
    near = ratio > -0.25
    return jnp.where(near, near_above, above), jnp.where(near, near_below, fall + above)


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) − 1 for x <= 0; written out because Pallas has expm1 on no TPU and no Hopper GPU."""
    series = 1 / 40320
    for divisor in (5040, 720, 120, 24, 6, 2, 1):
        series = series * x + 1 / divisor
    return jnp.where(x > -0.5, series * x, jnp.exp(x) - 1)


def _double_artanh(x: jax.Array) -> jax.Array:
    """2 artanh(x) = log((1 + x) / (1 − x)) for |x| < 1/7."""
    square = x * x
    return 2 * x * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9))))


def at_targets(scaled: jax.Array, targets: jax.Array, settings: Settings, shard: Shard = WHOLE) -> jax.Array:
    """The targets' entries of [n, V] scaled logits; NaN for an id that the vocabulary does not have."""
    width = scaled.shape[-1]
    local = targets - shard.offset
    mine = (local >= 0) & (local < width)
    found = jnp.take_along_axis(scaled, jnp.where(mine, local, 0)[:, None], axis=-1)[:, 0]
    if shard.axes:
        found = jax.lax.psum(jnp.where(mine, found, 0.0), shard.axes)
        mine = jax.lax.pmax(mine.astype(jnp.int32), shard.axes) > 0
    if settings.vocab_size is not None:
        mine &= targets < settings.vocab_size
    return jnp.where(mine, found, jnp.nan)


def columns(width: int, shard: Shard) -> jax.Array:
    """Token ids of the columns, [1, width]."""
    return shard.offset + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
