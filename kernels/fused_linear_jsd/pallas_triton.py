"""The row pass as one kernel through the Triton compiler, for NVIDIA cards older than Hopper.

One program scores one row in three sweeps over slices of the vocabulary: the normalisers, then the sums that the scores
are, then the factors. A row of a large vocabulary (600 KB in float32 at 152,064 columns) does not fit the memory of a
multiprocessor, so sweeps two and three read it again through L2, and from device memory where L2 cannot hold the rows
in work either.

jax deprecates this route from 0.11 on; where it is gone, `available()` is False.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from unisd_jax.kernels.fused_linear_jsd import rows

try:
    from jax.experimental.pallas import triton
except ImportError:  # a jax that no longer carries the Triton route
    triton = None

FACTORS = ("divergence", "student_logp")
# What the kernel writes per token, in this order; the first three without a teacher.
SCORES = (
    "student_normaliser",
    "student_logp",
    "student_entropy",
    "teacher_normaliser",
    "teacher_logp",
    "divergence",
    "influence",
)
# Columns per slice: a power of two, as the compiler demands. Four per thread are one 16-byte load, and few enough
# values for four programs per multiprocessor.
SLICE = 1024
WARPS = 8
# Where a running maximum starts: finite, so that a slice of -inf logits does not subtract infinities.
LOWEST = float(jnp.finfo(jnp.float32).min)


def available() -> bool:
    """Whether this jax can still compile Pallas kernels through Triton."""
    return hasattr(triton, "CompilerParams")


def score_rows(
    student: jax.Array,
    teacher: jax.Array | None,
    targets: jax.Array,
    *,
    settings: rows.Settings,
    wanted: tuple[str, ...] = (),
    factor_dtype=jnp.float32,
    interpret: bool = False,
) -> tuple[rows.RowScores, dict[str, jax.Array]]:
    """Scores of n tokens from their logits, and the factors `wanted`, as `rows.score_rows` gives them.

    Args:
      student: [n, V] float32, hidden @ head.T.
      teacher: the same of the teacher; None where `settings.alpha` is.
      targets: [n] token ids. One outside the vocabulary gets a NaN log-prob.
      settings: what the scores mean, without entry ceiling.
      wanted: some of "divergence", "student_logp".
      factor_dtype: of the factors; everything is computed in float32.
      interpret: run the kernel as ordinary jax operations, on any device.

    Returns:
      (scores, factors). A factor is temperature · ∂score/∂student, [n, V], not yet multiplied by any weight.

    Raises:
      RuntimeError: this jax no longer compiles Pallas kernels through Triton.
      ValueError: arguments that do not fit together, an entry ceiling, or a factor that this kernel does not have.
    """
    if not available():
        raise RuntimeError(
            f"jax {jax.__version__} has no jax.experimental.pallas.triton.CompilerParams: "
            "it no longer compiles Pallas kernels through Triton"
        )
    _check(student, teacher, targets, settings, wanted)
    wanted = tuple(name for name in FACTORS if name in wanted)
    return _score_rows(student, teacher, targets, settings, wanted, jnp.dtype(factor_dtype), interpret)


def _check(student, teacher, targets, settings: rows.Settings, wanted) -> None:
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
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(f"teacher is {teacher.shape}; expected the student's {student.shape}")
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits is not None and logits.dtype != jnp.float32:
            raise ValueError(f"{name} is {logits.dtype}; expected float32")


@functools.partial(jax.jit, static_argnames=("settings", "wanted", "factor_dtype", "interpret"))
def _score_rows(student, teacher, targets, settings, wanted, factor_dtype, interpret):
    """`score_rows` after the checks."""
    tokens, width = student.shape
    # What the kernel masks as padding includes the ragged end of the last slice.
    columns = width if settings.vocab_size is None else min(settings.vocab_size, width)
    settings = dataclasses.replace(settings, vocab_size=columns)
    logits = [student] if teacher is None else [student, teacher]
    names = SCORES[:3] if teacher is None else SCORES
    if tokens == 0:
        found = [jnp.zeros((0,), jnp.float32) for _ in names]
        written = [jnp.zeros((0, width), factor_dtype) for _ in wanted]
    else:
        outputs = _launch(logits, targets, settings, wanted, factor_dtype, interpret, len(names))
        found, written = outputs[: len(names)], outputs[len(names) :]
    score = dict(zip(names, found, strict=True))
    valid = (targets >= 0) & (targets < columns)
    for name in ("student_logp", "teacher_logp"):
        if name in score:
            score[name] = jnp.where(valid, score[name], jnp.nan)
    statistics = rows.in_one_number(rows.Statistics(*(score.pop(name, None) for name in rows.Statistics._fields)))
    empty = {"divergence": None, "teacher_logp": None}
    return rows.RowScores(**empty | score, statistics=statistics), dict(zip(wanted, written, strict=True))


def _launch(logits, targets, settings, wanted, factor_dtype, interpret, sums: int) -> Sequence[jax.Array]:
    """The kernel's outputs: `sums` times [n], then one [n, V] per factor."""
    tokens, width = logits[0].shape
    slice_width = min(SLICE, pl.next_power_of_2(width))
    slices = pl.cdiv(width, slice_width)
    # The block is a whole number of slices; the part beyond the array is masked in every load and store.
    row = pl.BlockSpec((1, slices * slice_width), lambda token: (token, 0))
    number = pl.BlockSpec((1,), lambda token: (token,))
    kernel = functools.partial(
        _score_row, teachers=len(logits) - 1, width=width, slice_width=slice_width, settings=settings, wanted=wanted
    )
    return pl.pallas_call(
        kernel,
        grid=(tokens,),
        in_specs=[number] + [row] * len(logits),
        out_specs=[number] * sums + [row] * len(wanted),
        out_shape=[jax.ShapeDtypeStruct((tokens,), jnp.float32)] * sums
        + [jax.ShapeDtypeStruct((tokens, width), factor_dtype)] * len(wanted),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
        name="score_rows",
    )(targets.astype(jnp.int32), *logits)


def _score_row(target_ref, *refs, teachers: int, width: int, slice_width: int, settings, wanted) -> None:
    """All scores and factors of one row."""
    inputs, outputs = refs[: 1 + teachers], refs[1 + teachers :]
    target = target_ref[0]
    slices = pl.cdiv(width, slice_width)

    def read(ref, index):
        """One slice of scaled logits, [1, slice_width], and their slope."""
        shard = rows.Shard(offset=index * slice_width)
        inside = rows.columns(slice_width, shard) < width
        raw = triton.load(ref.at[:, pl.ds(index * slice_width, slice_width)], mask=inside, other=0.0)
        return rows.scale(raw, settings, shard)

    normalisers = [_normaliser(functools.partial(read, ref), slices, slice_width) for ref in inputs]

    def log_probs(index):
        """Log-probs of one slice, student's first, log 0 = -inf, and the student's slope."""
        scaled = [read(ref, index) for ref in inputs]
        pairs = zip(scaled, normalisers, strict=True)
        return [values - normaliser for (values, _), normaliser in pairs], scaled[0][1]

    def hits(index):
        return rows.columns(slice_width, rows.Shard(offset=index * slice_width)) == target

    totals = _sums(log_probs, hits, slices, slice_width, settings)
    scores = [normalisers[0], *totals[:2], *normalisers[1:], *totals[2:]]
    for ref, total in zip(outputs[: len(scores)], scores, strict=True):
        ref[0] = total
    for name, ref in zip(wanted, outputs[len(scores) :], strict=True):
        influence = scores[-1] if name == "divergence" else None
        _write_factor(ref, log_probs, hits, slices, slice_width, width, settings, influence)


def _normaliser(read, slices: int, slice_width: int):
    """Log of the summed exponentials of a row.

    Every lane keeps a maximum and a sum of its own, so the loop has no reduction across threads.
    """

    def add(index, carry):
        largest, total = carry
        values, _ = read(index)
        rise = values - largest
        # One exponential serves both cases: it shrinks the old sum where the maximum rises, the new term elsewhere.
        shrunk = jnp.exp(-jnp.abs(rise))
        return jnp.maximum(largest, values), jnp.where(rise > 0, total * shrunk + 1, total + shrunk)

    start = jnp.full((1, slice_width), LOWEST, jnp.float32), jnp.zeros((1, slice_width), jnp.float32)
    largest, total = jax.lax.fori_loop(0, slices, add, start)
    overall = jnp.max(largest)
    return overall + jnp.log(jnp.sum(total * jnp.exp(largest - overall)))


def _sums(log_probs, hits, slices: int, slice_width: int, settings) -> list:
    """Student log-prob, entropy and, with a teacher, its log-prob, the divergence and the summed influence."""

    def terms(index):
        exact, _ = log_probs(index)
        found = [jnp.where(hits(index), values, 0.0) for values in exact]
        ls, *rest = (jnp.maximum(values, rows.LOG_ZERO) for values in exact)
        values = [found[0], -jnp.exp(ls) * ls]
        for lt in rest:
            divergence = rows.divergence_terms(ls, lt, settings)
            values += [found[1], divergence.entries, divergence.influence]
        return values

    def add(index, totals):
        return [total + values for total, values in zip(totals, terms(index), strict=True)]

    count = 2 if settings.alpha is None else 5
    start = [jnp.zeros((1, slice_width), jnp.float32)] * count
    return [jnp.sum(total) for total in jax.lax.fori_loop(0, slices, add, start)]


def _write_factor(ref, log_probs, hits, slices: int, slice_width: int, width: int, settings, influence) -> None:
    """The factor of the divergence, whose influences sum to `influence`, or of the log-prob where that is None."""

    def write(index, _):
        exact, slope = log_probs(index)
        ls, *rest = (jnp.maximum(values, rows.LOG_ZERO) for values in exact)
        if influence is None:
            factor = hits(index).astype(jnp.float32) - jnp.exp(ls)
        else:
            terms = rows.divergence_terms(ls, rest[0], settings)
            factor = terms.influence - terms.p * influence
        inside = rows.columns(slice_width, rows.Shard(offset=index * slice_width)) < width
        piece = ref.at[:, pl.ds(index * slice_width, slice_width)]
        triton.store(piece, (factor * slope).astype(ref.dtype), mask=inside)
        return 0

    jax.lax.fori_loop(0, slices, write, 0)
