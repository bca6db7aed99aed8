"""The row pass as one TPU kernel: it reads the logits from HBM once and writes each factor once.

A block of rows lies in VMEM with its whole vocabulary. Sweeps over it, slice by slice, find the maxima, the
normalisers, the sums that the scores are, and the factors.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unisd_jax.kernels.fused_linear_jsd import rows
from unisd_jax.kernels.fused_linear_jsd.rows import RowScores, Settings, Shard

FACTORS = ("divergence", "student_logp")
# What the kernel finds per token, in this order, without a teacher and with one.
SCORES_ALONE = ("student_logp", "student_entropy", "student_normaliser")
SCORES = (*SCORES_ALONE[:2], "teacher_logp", "divergence", "influence", "student_normaliser", "teacher_normaliser")
LANES = 128
# One row of registers. More would only take more VMEM: a copy of 8 rows is megabytes long as it is.
ROWS = 8
# Wide enough to hide the latency of the exponentials; wider ones spill more registers and gain nothing.
SLICE = 2048
# What a core of v5p or 7x has; v5e and v6e have twice as much, v4 a quarter.
VMEM_BYTES = 64 * 2**20
# For targets, scores and spilled registers, which together stay far below it.
SPARE_BYTES = 2 * 2**20


def score_rows(
    student: jax.Array,
    teacher: jax.Array | None,
    targets: jax.Array,
    *,
    settings: Settings,
    wanted: tuple[str, ...] = (),
    factor_dtype=jnp.float32,
    interpret: bool = False,
    vmem_bytes: int = VMEM_BYTES,
) -> tuple[RowScores, dict[str, jax.Array]]:
    """Scores of n tokens from their logits, and the factors `wanted`, as `rows.score_rows` gives them.

    Args:
      student: [n, V] float32, hidden @ head.T.
      teacher: the same of the teacher; None where `settings.alpha` is.
      targets: [n] token ids. One outside the vocabulary gets a NaN log-prob.
      settings: what the scores mean, without entry ceiling.
      wanted: some of "divergence", "student_logp".
      factor_dtype: of the factors; everything is computed in float32.
      interpret: run the kernel as ordinary jax operations, on any device.
      vmem_bytes: what a core of the TPU has.

    Returns:
      (scores, factors). A factor is temperature · ∂score/∂student, [n, V], not yet multiplied by any weight.

    Raises:
      ValueError: arguments that do not fit together, something that only `rows.score_rows` has, or too little VMEM.
    """
    _check(student, teacher, targets, settings, wanted)
    n, vocab = student.shape
    need = vmem_need(vocab, settings=settings, wanted=wanted, factor_dtype=factor_dtype)
    if need > vmem_bytes:
        raise ValueError(f"{ROWS} rows of {vocab} columns need {need} bytes of VMEM, but a core has {vmem_bytes}")
    wanted = tuple(name for name in FACTORS if name in wanted)
    if n == 0:  # a grid needs at least one block
        return rows.score_rows(student, teacher, targets, settings=settings, wanted=wanted, factor_dtype=factor_dtype)
    # What the kernel masks as padding includes the ragged end of the last lanes.
    settings = dataclasses.replace(settings, vocab_size=min(vocab, settings.vocab_size or vocab))
    logits = [student] if teacher is None else [student, teacher]
    found, *factors = _launch(logits, targets, settings, wanted, factor_dtype, need, interpret)
    names = SCORES_ALONE if teacher is None else SCORES
    score = dict.fromkeys(SCORES) | {name: found[:, lane] for lane, name in enumerate(names)}
    valid = (targets >= 0) & (targets < settings.vocab_size)
    for name in ("student_logp", "teacher_logp")[: len(logits)]:
        score[name] = jnp.where(valid, score[name], jnp.nan)
    statistics = rows.in_one_number(rows.Statistics(**{name: score.pop(name) for name in rows.Statistics._fields}))
    return RowScores(**score, statistics=statistics), dict(zip(wanted, factors, strict=True))


def vmem_need(vocab: int, *, settings: Settings, wanted: tuple[str, ...] = (), factor_dtype=jnp.float32) -> int:
    """Bytes of VMEM that `score_rows` takes for V = `vocab`."""
    inputs = 4 if settings.alpha is None else 8
    outputs = len(set(wanted)) * jnp.dtype(factor_dtype).itemsize
    # Inputs and outputs are there twice: the next block is copied in, and the last one out, while this one is computed.
    return ROWS * _whole_lanes(vocab) * (2 * (inputs + outputs) + 4 * ("divergence" in wanted)) + SPARE_BYTES


def fits(vocab: int, *, vmem_bytes: int = VMEM_BYTES, **arguments) -> bool:
    """Whether `score_rows` has the VMEM for V = `vocab`; `arguments` are those of `vmem_need`."""
    return vmem_need(vocab, **arguments) <= vmem_bytes


def _check(student, teacher, targets, settings: Settings, wanted) -> None:
    if settings.entry_ceiling is not None:
        raise ValueError(f"entry_ceiling is {settings.entry_ceiling}; this kernel has none, rows.score_rows does")
    for name in wanted:
        if name not in FACTORS:
            raise ValueError(f"wanted contains {name!r}; this kernel has {FACTORS}, rows.score_rows all factors")
    if (teacher is None) != (settings.alpha is None):
        raise ValueError(f"alpha is {settings.alpha} and teacher is {'' if teacher is None else 'not '}None")
    if teacher is None and "divergence" in wanted:
        raise ValueError("wanted contains 'divergence', which needs a teacher")
    if student.ndim != 2 or student.shape[1] == 0 or targets.shape != student.shape[:1]:
        raise ValueError(f"student is {student.shape} and targets {targets.shape}; expected [n, V] and [n], V > 0")
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits is not None and (logits.shape != student.shape or logits.dtype != jnp.float32):
            raise ValueError(f"{name} is {logits.dtype} {logits.shape}; expected float32 {student.shape}")


def _whole_lanes(vocab: int) -> int:
    return pl.cdiv(vocab, LANES) * LANES


def _launch(
    logits, targets, settings: Settings, wanted, factor_dtype, vmem: int, interpret: bool
) -> Sequence[jax.Array]:
    """The scores in the first lanes of [n, 128], then one [n, V] per factor."""
    (n, vocab), width = logits[0].shape, _whole_lanes(logits[0].shape[1])
    narrow, scores, row = (pl.BlockSpec((ROWS, size), lambda block: (block, 0)) for size in (1, LANES, width))
    factor = jax.ShapeDtypeStruct((n, vocab), factor_dtype)
    return pl.pallas_call(
        functools.partial(_score_block, settings=settings, vocab=vocab, wanted=wanted),
        grid=(pl.cdiv(n, ROWS),),
        in_specs=[narrow] + [row] * len(logits),
        out_specs=[scores] + [row] * len(wanted),
        out_shape=[jax.ShapeDtypeStruct((n, LANES), jnp.float32)] + [factor] * len(wanted),
        scratch_shapes=[pltpu.VMEM((ROWS, width), jnp.float32)] * ("divergence" in wanted),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem),
        interpret=interpret,
        name="score_rows",
    )(targets.astype(jnp.int32)[:, None], *logits)


class _Columns(NamedTuple):
    """A slice of the vocabulary: the id of its first column, its width, and whether some columns may be padding."""

    start: jax.Array | int
    size: int
    masked: bool

    @property
    def index(self) -> tuple:
        return slice(None), pl.ds(self.start, self.size)

    def are(self, targets: jax.Array) -> jax.Array:
        """[rows, size]: where the column is the row's target."""
        return rows.columns(self.size, Shard(offset=self.start)) == targets


@dataclasses.dataclass(frozen=True)
class _Logits:
    """A block of logits in VMEM, the student's first. Columns from `vocab` on hold anything at all."""

    refs: tuple
    vocab: int
    settings: Settings

    def scaled(self, columns: _Columns) -> list[tuple[jax.Array, jax.Array | float]]:
        """The scaled logits and their slope, as `rows.scale` gives them."""
        settings = self.settings if columns.masked else dataclasses.replace(self.settings, vocab_size=None)
        return [rows.scale(ref[columns.index], settings, Shard(offset=columns.start)) for ref in self.refs]

    def sweep(self, visit: Callable, count: int, operation=jnp.add, reduce=jnp.sum, start: float = 0.0) -> list:
        """[rows, 1] totals over the vocabulary of the `count` arrays that `visit` returns for a slice."""
        whole, unmasked = self.vocab // SLICE, self.settings.vocab_size // SLICE
        totals = [jnp.full((ROWS, LANES), start, jnp.float32)] * count

        def step(size, masked, index, totals):
            found = visit(_Columns(pl.multiple_of(index * SLICE, LANES), size, masked))
            # Lane by lane, since a sum across lanes is slow.
            parts = [[values[:, lane : lane + LANES] for lane in range(0, size, LANES)] for values in found]
            return [operation(t, functools.reduce(operation, part)) for part, t in zip(parts, totals, strict=True)]

        for first, last, masked in ((0, unmasked, False), (unmasked, whole, True)):
            if first < last:
                totals = jax.lax.fori_loop(first, last, functools.partial(step, SLICE, masked), totals)
        if tail := _whole_lanes(self.vocab) - whole * SLICE:
            totals = step(tail, True, whole, totals)
        return [reduce(total, axis=1, keepdims=True) for total in totals]


def _score_block(targets_ref, *refs, settings: Settings, vocab: int, wanted: tuple[str, ...]) -> None:
    """All scores and factors of one block of rows."""
    teachers = int(settings.alpha is not None)
    logits = _Logits(refs[: 1 + teachers], vocab, settings)
    scores_ref, *outputs = refs[1 + teachers :]
    influence_ref = outputs[len(wanted)] if "divergence" in wanted else None
    targets = targets_ref[...]
    normalisers = _normalisers(logits)

    def log_probs(columns):
        pairs = zip(logits.scaled(columns), normalisers, strict=True)
        return [scaled - normaliser for (scaled, _), normaliser in pairs]

    def sums(columns):
        logs = log_probs(columns)
        hits = [jnp.where(columns.are(targets), log, 0.0) for log in logs]
        ls, *lt = (jnp.maximum(log, rows.LOG_ZERO) for log in logs)
        found = [hits[0], -jnp.exp(ls) * ls]
        if lt:
            entries, influence, *_ = rows.divergence_terms(ls, *lt, settings)
            found += [hits[1], entries, influence]
            if influence_ref is not None:
                influence_ref[columns.index] = influence
        return found

    totals = logits.sweep(sums, 2 + 3 * teachers)

    def write(columns):
        p, slope = jnp.exp(log_probs(columns)[0]), logits.scaled(columns)[0][1]
        for name, ref in zip(wanted, outputs, strict=False):
            if name == "divergence":
                factor = influence_ref[columns.index] - p * totals[SCORES.index("influence")]
            else:
                factor = columns.are(targets) - p
            ref[columns.index] = (factor * slope).astype(ref.dtype)
        return []

    if wanted:
        logits.sweep(write, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    scores_ref[...] = sum(jnp.where(lane == i, total, 0.0) for i, total in enumerate(totals + normalisers))


def _normalisers(logits: _Logits) -> list[jax.Array]:
    """[rows, 1] log Σ exp of the student and of the teacher."""
    count = len(logits.refs)
    # Two sweeps: to keep the maximum and the sum together would take a second exponential per entry.
    largest = logits.sweep(
        lambda columns: [scaled for scaled, _ in logits.scaled(columns)], count, jnp.maximum, jnp.max, -jnp.inf
    )
    sums = logits.sweep(
        lambda columns: [jnp.exp(z - top) for (z, _), top in zip(logits.scaled(columns), largest, strict=True)], count
    )
    return [top + jnp.log(total) for top, total in zip(largest, sums, strict=True)]
