"""What the kernels must compute, in float64 numpy, as textbooks write it; and random inputs to compute it for.

Nothing here is shared with the code under test: log-probs by log-sum-exp, divergences by their definitions, gradients
by the chain rule through the probabilities.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unisd_jax.kernels import fused_linear_jsd, fused_linear_jsd_loss, fused_linear_jsd_value_and_grad

ALPHAS = [0.0, 0.1, 0.5, 0.9, 1.0]
DIFFERENTIABLE = ("divergence", "clipped_divergence", "student_logp", "student_entropy")
STATIC = (
    "alpha", "temperature", "soft_cap", "vocab_size", "entry_ceiling", "quantile", "chunk_size", "vocab_block",
    "layout", "implementation", "interpret",
)  # fmt: skip


class Case(NamedTuple):
    """The arrays of a call, in the order of the arguments."""

    student_hidden: jax.Array
    student_head: jax.Array
    teacher_hidden: jax.Array
    teacher_head: jax.Array | None
    targets: jax.Array


def random_case(tokens, width, vocab, seed=0, *, dtype=jnp.float32, noise=None, spread=2.0, teacher_width=None):
    """Random arrays whose logits have the standard deviation `spread`.

    The teacher is another model, of width `teacher_width`; with `noise` it is the student with that much noise on its
    hidden states.
    """
    rng = np.random.default_rng(seed)

    def draw(rows, columns, size):
        return jnp.asarray(rng.normal(size=(rows, columns)) * size, dtype)

    def model(width):
        return draw(tokens, width, spread / np.sqrt(width)), draw(vocab, width, 1.0)

    hidden, head = model(width)
    if noise is None:
        taught, teacher_head = model(teacher_width or width)
    else:
        taught, teacher_head = hidden + draw(tokens, width, noise * spread / np.sqrt(width)), None
    return Case(hidden, head, taught, teacher_head, jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32))


def random_weights(tokens, seed=0, names=("divergence",)):
    """Weights of both signs by the name of the score."""
    rng = np.random.default_rng(1000 + seed)
    return {name: jnp.asarray(rng.normal(size=tokens) / max(tokens, 1), jnp.float32) for name in names}


def random_mask(tokens, valid, seed=0):
    """[tokens] bool with `valid` of them True, in random places."""
    return jnp.asarray(np.random.default_rng(seed).permutation(tokens) < valid)


def _log_probs(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _times(p, values):
    """p · values, 0 where p is."""
    return p * np.where(p > 0, values, 0.0)


class Oracle:
    """Scores [N] by name, and gradients of their weighted sums, in float64; 0 where the mask is off."""

    def __init__(
        self, case: Case, *, alpha, temperature=1.0, soft_cap=None, vocab_size=None, entry_ceiling=None, mask=None,
        ceiling=None, quantile=None, **_,
    ):  # fmt: skip
        arrays = [None if x is None else np.asarray(x).astype(np.float64) for x in case[:4]]
        if arrays[3] is None:
            arrays[3] = arrays[1]
        tokens, vocab = arrays[0].shape[0], arrays[1].shape[0]
        vocab_size = vocab if vocab_size is None else vocab_size
        self.mask = np.ones(tokens, bool) if mask is None else np.asarray(mask)
        for hidden in (0, 2):
            arrays[hidden] = np.where(self.mask[:, None], arrays[hidden], 0.0)
        self.hidden, self.head = arrays[:2]
        targets = np.asarray(case.targets)
        valid = (targets >= 0) & (targets < vocab_size)
        self.targets, rows = np.where(valid, targets, 0), np.arange(tokens)
        ls, lt = (np.full((tokens, vocab), -np.inf) for _ in range(2))  # padding has probability 0
        self.slope = np.zeros((tokens, vocab))
        for found, hidden, head in ((ls, *arrays[:2]), (lt, *arrays[2:])):
            logits, slope = hidden @ head.T, 1.0
            if soft_cap is not None:
                squashed = np.tanh(logits / soft_cap)
                logits, slope = soft_cap * squashed, 1 - squashed**2
            found[:, :vocab_size] = _log_probs(logits[:, :vocab_size] / temperature)
            if found is ls:
                self.slope[:, :vocab_size] = (slope / temperature * np.ones((tokens, vocab)))[:, :vocab_size]
        self.ls, self.p, q = ls, np.exp(ls), np.exp(lt)
        real = np.arange(vocab) < vocab_size
        gap = np.where(real, np.where(real, ls, 0) - np.where(real, lt, 0), 0)
        # Entries e of the divergence, and p · ∂e/∂p.
        if alpha == 0:
            entries, self.parts = -q * gap, -q
        elif alpha == 1:
            entries, self.parts = self.p * gap, self.p * (gap + 1)
        else:
            lm = np.logaddexp(np.log1p(-alpha) + ls, np.log(alpha) + lt)
            p_m, q_m = (np.where(real, np.where(real, x, 0) - np.where(real, lm, 0), 0) for x in (ls, lt))
            entries = alpha * q * q_m + (1 - alpha) * self.p * p_m
            through_m = alpha * np.exp(q_m) + (1 - alpha) * np.exp(p_m)
            self.parts = self.p * (1 - alpha) * (p_m + 1 - through_m)
        above = np.zeros(entries.shape, bool)
        if entry_ceiling is not None:
            above = entries > entry_ceiling
            entries, self.parts = np.where(above, entry_ceiling, entries), np.where(above, 0.0, self.parts)
        divergence = entries.sum(axis=1)
        if quantile is not None:
            counted = divergence[self.mask]
            ceiling = np.quantile(counted, quantile) if counted.size else np.inf
        self.ceiling = np.inf if ceiling is None else np.broadcast_to(np.asarray(ceiling, np.float64), tokens)
        self.clipped = (divergence > self.ceiling) & self.mask
        self.scores = {
            "divergence": divergence,
            "student_logp": np.where(valid, ls[rows, self.targets], np.nan),
            "teacher_logp": np.where(valid, lt[rows, self.targets], np.nan),
            "student_entropy": -_times(self.p, ls).sum(axis=1),
            "clipped_divergence": np.where(self.clipped, self.ceiling, divergence),
        }
        self.scores = {name: np.where(self.mask, values, 0.0) for name, values in self.scores.items()}
        self.entry_capped = above.any(axis=1) & self.mask

    def loss(self, weights):
        """Σ_t w_t min(D_t, κ)."""
        return float(np.sum(np.where(self.mask, weights, 0.0) * self.scores["clipped_divergence"]))

    def gradients(self, weights: dict):
        """Gradients of Σ_k Σ_t w_kt score_kt to hidden states [N, H] and head [V, H]."""
        total = np.zeros(self.p.shape)
        for name, weight in weights.items():
            weight = np.where(self.mask, np.asarray(weight, np.float64), 0.0)
            if name == "clipped_divergence":
                weight = np.where(self.clipped, 0.0, weight)
            total += weight[:, None] * self._by_logits(name)
        total *= self.slope
        return total @ self.head, total.T @ self.hidden

    def _by_logits(self, name):
        """∂score/∂z for softmax(z): ∂/∂z_u = Σ_v p_v (δ_uv − p_u) ∂/∂p_v."""
        if name == "student_logp":
            return np.eye(self.p.shape[1])[self.targets] - self.p
        parts = -_times(self.p, self.ls + 1) if name == "student_entropy" else self.parts
        return parts - self.p * parts.sum(axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=STATIC)
def scores_of(case: Case, mask=None, ceiling=None, **static):
    """`fused_linear_jsd`, compiled."""
    return fused_linear_jsd(*case, mask=mask, ceiling=ceiling, **static)


@functools.partial(jax.jit, static_argnames=("by", *STATIC))
def scores_and_gradients(case: Case, weights: dict, mask=None, ceiling=None, *, by=("student_hidden", "student_head"),
                         **static):  # fmt: skip
    """(scores, gradients of Σ_k Σ_t w_kt score_kt to the arrays in `by`)."""

    def total(arrays):
        scores = fused_linear_jsd(*case._replace(**arrays), mask=mask, ceiling=ceiling, **static)
        return sum(jnp.sum(weight * getattr(scores, name)) for name, weight in weights.items()), scores

    gradients, scores = jax.grad(total, has_aux=True)({name: getattr(case, name) for name in by})
    return scores, [gradients[name] for name in by]


@functools.partial(jax.jit, static_argnames=("by", *STATIC))
def loss_and_gradients(case: Case, weights, mask=None, ceiling=None, *, by=("student_hidden", "student_head"),
                       **static):  # fmt: skip
    """((loss, scores), gradients of `fused_linear_jsd_loss` to the arrays in `by`, which may name "weights")."""

    def total(arrays):
        arrays = dict(arrays)
        own = arrays.pop("weights", weights)
        return fused_linear_jsd_loss(*case._replace(**arrays), own, mask=mask, ceiling=ceiling, **static)

    arrays = {name: weights if name == "weights" else getattr(case, name) for name in by}
    found, gradients = jax.value_and_grad(total, has_aux=True)(arrays)
    return found, [gradients[name] for name in by]


@functools.partial(jax.jit, static_argnames=("head_gradient", *STATIC))
def value_and_grad(case: Case, weights, mask=None, ceiling=None, *, head_gradient=True, **static):
    """`fused_linear_jsd_value_and_grad`, compiled."""
    return fused_linear_jsd_value_and_grad(
        *case, weights, mask=mask, ceiling=ceiling, head_gradient=head_gradient, **static
    )


def relative_error(found, expected):
    """The largest |found − expected| / |expected|; 0 for no numbers."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-300), initial=0.0))


def error_of_maximum(found, expected):
    """max |found − expected| / max |expected|."""
    found, expected = np.asarray(found).astype(np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(found - expected), initial=0.0) / max(np.max(np.abs(expected), initial=0.0), 1e-300))


def with_whole_normalisers(scores):
    """Row scores whose normalisers are one number each: how a kernel divides them into two is its own affair."""
    if scores.statistics is None:
        return scores
    student, teacher, influence = scores.statistics
    whole = (None if pair is None else pair.largest + pair.rest for pair in (student, teacher))
    return scores._replace(
        statistics=scores.statistics._replace(student_normaliser=next(whole), teacher_normaliser=next(whole))
    )
