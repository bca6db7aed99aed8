"""Scoring the teacher's views, without gradient: the primary one, the negative one and the K auxiliary ones.

Auxiliary views stream: each adds its sampled-token log-probs to a `Spread` and is forgotten, so memory does not grow
with K. With a `Budget` most of them are not scored at all.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisd_jax.losses import Objective, Spread, TeacherScores, add_views, no_views, spread_disagreement, view_values
from unisd_jax.models import Lora, Model, completion_hidden, map_rows, sampled_token_scores
from unisd_jax.types import Completions, Contexts, Prompts, Views


class Network(NamedTuple):
    """A model with the weights it is run with."""

    model: Model
    params: dict[str, Any]
    lora: Lora | None

    def hidden(self, prompts: Prompts, completions: Completions) -> Float[Array, "B T H"]:
        """The states that predict each completion token."""
        return jax.lax.stop_gradient(completion_hidden(self.model, self.params, self.lora, prompts, completions))

    @property
    def head(self) -> Float[Array, "V H"]:
        return self.model.head(self.params)

    def logps(
        self, hidden: Float[Array, "*B H"], ids: Int[Array, "*B"], mask: Bool[Array, "*B"], temperature: float = 1.0
    ) -> Float[Array, "*B"]:
        """Log-probs of given tokens at hidden states, without gradient; 0 where the mask is off."""
        options = self.model.head_options
        return sampled_token_scores(hidden, self.head, ids, mask, temperature=temperature, options=options).logp


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of the auxiliary scoring is done: a `share` of the examples or tokens, those where `signal` is largest.

    Examples are rounded up to whole micro-batches.

    `signal` "entropy" is the student's, and what is not scored counts as agreed (weight 1); "spread" is the
    disagreement of the first two views, which are scored everywhere and stand for the others where those are not.
    """

    share: float
    unit: Literal["example", "token"] = "example"
    signal: Literal["entropy", "spread"] = "entropy"


@dataclasses.dataclass(frozen=True)
class ContextScoring:
    """How the auxiliary views are run: how many at a time, in how many parts of the batch, within which budget."""

    views_per_pass: int = 1
    micro_batches: int = 1
    budget: Budget | None = None


def score_primary_and_negative(
    teacher: Network, views: Views, *, settings: Objective, micro_batches: int
) -> TeacherScores:
    """What the mechanisms that are on need of the primary and the negative view; only those passes are run."""
    contrast = settings.contrast_weight > 0
    needs_hidden = settings.loss == "divergence" or settings.matching_weight > 0
    if not needs_hidden and not contrast:
        return TeacherScores()
    if views.teacher is None or (contrast and views.negative is None):
        missing = "teacher" if views.teacher is None else "negative"
        raise ValueError(f"the objective's settings need the {missing} view, which the batch does not have")

    def score(rows):
        prompts, negative, completions = rows
        hidden = teacher.hidden(prompts, completions)
        if not contrast:
            return TeacherScores(hidden)
        positive, wrong = (
            teacher.logps(states, completions.ids, completions.mask, settings.temperature)
            for states in (hidden, teacher.hidden(negative, completions))
        )
        return TeacherScores(hidden if needs_hidden else None, positive, wrong)

    return map_rows(score, (views.teacher, views.negative if contrast else None, views.completions), micro_batches)


def context_disagreement(
    teacher: Network,
    views: Views,
    mask: Bool[Array, "B T"],
    *,
    settings: Objective,
    scoring: ContextScoring,
    student_entropy: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "*B"], Bool[Array, "B T"] | None]:
    """(disagreement, scored) of the auxiliary views at temperature 1.

    The disagreement is [B, T] at the token level, [B] at the sequence level. `scored` is None where every token has
    one; under a budget by entropy it says which have.

    Raises:
      ValueError: the batch has no auxiliary views, or the budget needs the student's entropy, which was not given.
    """
    if views.contexts is None:
        raise ValueError("the objective's settings need auxiliary views, which the batch does not have")
    budget, level = scoring.budget, settings.agreement.level
    shape = mask.shape if level == "token" else mask.shape[:1]

    def disagree(spread):
        return spread_disagreement(spread, mask, statistic=settings.agreement.statistic, level=level)

    if budget is None:
        full = _stream(teacher, views.contexts, views.completions, mask, no_views(shape), level, scoring)
        return disagree(full), None
    first, rest = _first_views(views.contexts, 2 if budget.signal == "spread" else 0)
    spread = no_views(shape)
    if first is not None:
        spread = _stream(teacher, first, views.completions, mask, spread, level, scoring)
    known = disagree(spread) if first is not None else jnp.zeros(shape, jnp.float32)
    signal = known if budget.signal == "spread" else student_entropy
    if signal is None:
        raise ValueError("the budget's signal is the student's entropy, which was not given")
    run = _token_budget if budget.unit == "token" else _example_budget
    found, chosen, scored = run(teacher, rest, views.completions, mask, spread, signal, settings, scoring)
    flat = known.reshape(-1) if budget.unit == "token" else known
    # A place that is out of range is left alone: those beyond the budget.
    disagreement = flat.at[chosen].set(found, mode="drop").reshape(shape)
    return disagreement, None if budget.signal == "spread" else scored


def passes_saved(
    scoring: ContextScoring, *, batch: int, tokens: int, views: int, extra_passes: int = 0
) -> dict[str, float]:
    """Shares of the auxiliary work that a budget leaves out: forward passes of the body, rows of the head.

    `extra_passes` are those of the student that only the budget's signal needs; a saving can be negative.
    """
    budget = scoring.budget
    if budget is None:
        return {}
    first = 2 if budget.signal == "spread" else 0
    share = _share_of(budget, batch * tokens) / (batch * tokens)
    if budget.unit == "example":
        share = _kept_rows(scoring, batch) / batch
    head = first + share * (views - first)
    body = head if budget.unit == "example" else views
    return {
        "agreement_passes_saved": 1 - (body + extra_passes) / views,
        "agreement_head_saved": 1 - (head + extra_passes) / views,
    }


def _stream(teacher: Network, contexts: Contexts, completions, mask, spread: Spread, level, scoring) -> Spread:
    """`spread` with the views of `contexts`, some at a time."""
    step = math.gcd(scoring.views_per_pass, contexts.ids.shape[1])

    def score(rows):
        group, completions = rows
        repeated = jax.tree.map(lambda x: jnp.repeat(x, step, axis=0), completions)
        prompts = Prompts(*jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), group))
        hidden = teacher.hidden(prompts, repeated)
        logps = teacher.logps(hidden, repeated.ids, repeated.mask)
        return logps.reshape(-1, step, logps.shape[-1])

    def add(spread, group):
        logps = map_rows(score, (group, completions), scoring.micro_batches)
        return add_views(spread, view_values(jnp.moveaxis(logps, 1, 0), mask, level=level)), None

    return jax.lax.scan(add, spread, _groups(contexts, step))[0]


def _example_budget(teacher, contexts, completions, mask, spread, signal, settings: Objective, scoring):
    """(disagreement, rows, scored) of the examples with the largest mean signal per token."""
    level = settings.agreement.level
    if signal.ndim == 2:
        signal = jnp.sum(jnp.where(mask, signal, 0.0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    _, rows = jax.lax.top_k(signal, _kept_rows(scoring, mask.shape[0]))
    scored = jnp.broadcast_to(jnp.zeros(len(mask), bool).at[rows].set(True)[:, None], mask.shape)
    contexts, completions, mask = jax.tree.map(lambda x: x[rows], (contexts, completions, mask))
    spread = jax.tree.map(lambda x: x[rows] if x.ndim else x, spread)
    spread = _stream(teacher, contexts, completions, mask, spread, level, scoring)
    return spread_disagreement(spread, mask, statistic=settings.agreement.statistic, level=level), rows, scored


def _token_budget(teacher, contexts, completions, mask, spread, signal, settings: Objective, scoring):
    """(disagreement, places, scored) of the tokens with the largest signal.

    Every body pass is run, the head on these tokens alone. There is room for the budget's share of a batch without
    padding; of the tokens that there are, only their own share is used: the places beyond it are out of range.
    """
    room = _share_of(scoring.budget, mask.size)
    _, places = jax.lax.top_k(jnp.where(mask, signal, -jnp.inf).reshape(-1), room)
    kept = jnp.arange(room) < jnp.ceil(scoring.budget.share * jnp.sum(mask) - 1e-6)
    spread = jax.tree.map(lambda x: x.reshape(-1)[places] if x.ndim else x, spread)
    chosen = mask.reshape(-1)[places]
    ids = completions.ids.reshape(-1)[places]

    def add(spread, group):
        prompts = Prompts(*jax.tree.map(lambda x: x[:, 0], group))
        hidden = map_rows(lambda rows: teacher.hidden(*rows), (prompts, completions), scoring.micro_batches)
        logps = teacher.logps(hidden.reshape(-1, hidden.shape[-1])[places], ids, chosen)
        return add_views(spread, view_values(logps[None, None], chosen[None], level="token")[:, 0]), None

    spread, _ = jax.lax.scan(add, spread, _groups(contexts, 1))
    found = jax.tree.map(lambda x: x[None] if x.ndim else x, spread)
    found = spread_disagreement(found, chosen[None], statistic=settings.agreement.statistic, level="token")[0]
    places = jnp.where(kept, places, mask.size)
    scored = jnp.zeros(mask.size, bool).at[places].set(True, mode="drop").reshape(mask.shape)
    return found, places, scored


def _groups(contexts: Contexts, step: int) -> Contexts:
    """[B, K, P] → [K/step, B, step, P]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, step, x.shape[-1]), 1, 0), contexts)


def _first_views(contexts: Contexts, number: int) -> tuple[Contexts | None, Contexts]:
    if number == 0:
        return None, contexts
    return jax.tree.map(lambda x: x[:, :number], contexts), jax.tree.map(lambda x: x[:, number:], contexts)


def _kept_rows(scoring: ContextScoring, batch: int) -> int:
    """The examples a budget scores: its share, rounded up to whole parts of the batch."""
    return -(-_share_of(scoring.budget, batch) // scoring.micro_batches) * scoring.micro_batches


def _share_of(budget: Budget, number: int) -> int:
    """The budget's share of `number` things, rounded up; at least one."""
    return max(1, math.ceil(budget.share * number - 1e-6))
