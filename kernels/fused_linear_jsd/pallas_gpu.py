"""The row pass as one Pallas Mosaic GPU kernel, for Hopper and newer: one read of the logits, one write of the factors.

A row of logits does not fit into the shared memory of one multiprocessor, so a cluster of thread blocks holds it: each
warpgroup keeps its part of the columns in shared memory, sweeps over it there, and exchanges a few sums per row with
the others. Interpreted on a CPU, the same kernel runs with all columns in one part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from unisd_jax.kernels.fused_linear_jsd import rows

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # jax 0.10 needs absl-py for it, which it does not ask for
    plgpu = None

FACTORS = ("divergence", "student_logp")
# What the kernel finds per token, without a teacher and with one.
SCORES_ALONE = ("student_logp", "student_entropy", "student_normaliser")
SCORES = (*SCORES_ALONE, "teacher_logp", "divergence", "influence", "teacher_normaliser")
WARPGROUPS = 2  # of a block
LANES = 128  # columns of a tile
CHUNK = 8  # tiles a warpgroup handles at once: 8 columns per thread
BLOCKS = 128  # that there should be at least, to give every multiprocessor one
# For logits and exchanged sums, of the 113 KB where two blocks share a multiprocessor (one computes while the other
# waits) and of the 227 KB where a block has it alone, and the cluster sizes to try. 16 blocks are more than every GPU
# with clusters must take, but Hopper and Blackwell do.
SHARED_BYTES = {110 * 1024: (1, 2, 4, 8), 225 * 1024: (8, 16)}
# Below all logits but −inf, and finite: −inf − LOWEST is −inf.
LOWEST = -3e38


def supports(columns: int, *, settings: rows.Settings, wanted: tuple[str, ...] = ()) -> bool:
    """Whether `score_rows` takes rows of `columns` logits with these settings; the number of rows never matters."""
    return _objection(columns, settings, wanted) is None


def score_rows(
    student: jax.Array,
    teacher: jax.Array | None,
    targets: jax.Array,
    *,
    settings: rows.Settings,
    wanted: tuple[str, ...] = (),
    factor_dtype=jnp.float32,
    interpret=False,
) -> tuple[rows.RowScores, dict[str, jax.Array]]:
    """Scores of n tokens from their logits, and the factors `wanted`, as `rows.score_rows` gives them.

    Where V is not a multiple of 128, XLA copies the logits before and the factors after. Under a soft cap the factors
    of columns from `vocab_size` on are 0, also where the target is one of them.

    Args:
      student: [n, V] float32, hidden @ head.T.
      teacher: the same of the teacher; None where `settings.alpha` is.
      targets: [n] token ids. One outside the vocabulary gets a NaN log-prob.
      settings: what the scores mean, without entry ceiling.
      wanted: some of "divergence", "student_logp".
      factor_dtype: of the factors, float32 or bfloat16; everything is computed in float32.
      interpret: True, or the interpreter's parameters, to run on a CPU.

    Returns:
      (scores, factors). A factor is temperature · ∂score/∂student, [n, V], not yet multiplied by any weight.

    Raises:
      ValueError: what `supports` denies, or arrays that do not fit together.
    """
    if plgpu is None:
        raise RuntimeError(f"jax {jax.__version__} cannot import jax.experimental.pallas.mosaic_gpu; it needs absl-py")
    _check(student, teacher, targets, settings, wanted, factor_dtype)
    n, columns = student.shape
    if n == 0:
        return rows.score_rows(student, teacher, targets, settings=settings, wanted=wanted, factor_dtype=factor_dtype)
    limit = columns if settings.vocab_size is None else min(columns, settings.vocab_size)
    logits = [student] if teacher is None else [student, teacher]
    logits = [jnp.pad(x, ((0, 0), (0, -columns % LANES))).reshape(n, -1, LANES) for x in logits]
    plan = _interpreted(_plan(columns, len(logits))) if interpret else _plan(columns, len(logits))
    job = _Job(settings, tuple(x for x in FACTORS if x in wanted), plan, n, logits[0].shape[1], limit, bool(interpret))
    scores, factors = _call(job, logits, targets.astype(jnp.int32), factor_dtype, interpret)
    known = (targets >= 0) & (targets < limit)
    scores |= {name: jnp.where(known, scores[name], jnp.nan) for name in scores if name.endswith("_logp")}
    statistics = rows.in_one_number(rows.Statistics(*(scores.pop(name, None) for name in rows.Statistics._fields)))
    scores = rows.RowScores(**{"divergence": None, "teacher_logp": None, "statistics": statistics} | scores)
    return scores, {name: factor.reshape(n, -1)[:, :columns] for name, factor in factors.items()}


def _check(student, teacher, targets, settings, wanted, factor_dtype) -> None:
    if student.ndim != 2 or targets.shape != student.shape[:1] or student.dtype != jnp.float32:
        raise ValueError(
            f"student is {student.dtype} {student.shape}, targets {targets.shape}; expected float32 [n, V] and [n]"
        )
    if (teacher is None) != (settings.alpha is None):
        raise ValueError(f"alpha is {settings.alpha} {'without' if teacher is None else 'with'} teacher logits")
    if teacher is not None and (teacher.shape != student.shape or teacher.dtype != student.dtype):
        raise ValueError(f"teacher is {teacher.dtype} {teacher.shape}; expected {student.dtype} {student.shape}")
    if (name := jnp.dtype(factor_dtype).name) not in ("float32", "bfloat16"):
        raise ValueError(f"factor_dtype is {name}; expected float32 or bfloat16")
    if objection := _objection(student.shape[1], settings, wanted):
        raise ValueError(objection)


def _objection(columns, settings, wanted) -> str | None:
    if settings.entry_ceiling is not None:
        return f"entry_ceiling is {settings.entry_ceiling}; the GPU kernel has no entry ceiling"
    known = FACTORS if settings.alpha is not None else FACTORS[1:]
    if not set(wanted) <= set(known):
        return f"wanted is {wanted} with alpha {settings.alpha}; the GPU kernel then gives some of {known}"
    arrays = 1 if settings.alpha is None else 2
    if columns < 1 or _plan(columns, arrays) is None:
        return f"{arrays} x {columns} logits per token; expected one at least, and what 16 blocks have memory for"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a row is divided: over blocks, in a block over warpgroups, for a warpgroup into chunks of CHUNK tiles."""

    blocks: int
    warpgroups: int
    chunks: int

    @property
    def parts(self) -> int:
        return self.blocks * self.warpgroups

    @property
    def tiles(self) -> int:
        """Of one warpgroup."""
        return self.chunks * CHUNK

    def shared_bytes(self, arrays) -> int:
        return 4 * LANES * (arrays * self.warpgroups * self.tiles + 2 * self.parts)


def _plan(columns, arrays) -> _Plan | None:
    for budget, choices in SHARED_BYTES.items():
        for blocks in choices:
            plan = _Plan(blocks, WARPGROUPS, pl.cdiv(columns, blocks * WARPGROUPS * CHUNK * LANES))
            if plan.shared_bytes(arrays) <= budget:
                return plan
    return None


def _interpreted(plan) -> _Plan:
    """All in one part: the interpreters know no other block's memory, and compile anew for every warpgroup they run."""
    return _Plan(1, 1, plan.parts * plan.chunks)


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that is known when the kernel is built. A row has `tiles` tiles, of which `limit` columns count."""

    settings: rows.Settings
    factors: tuple[str, ...]
    plan: _Plan
    rows: int
    tiles: int
    limit: int
    interpret: bool

    @property
    def rows_each(self) -> int:
        """Rows of a cluster, one after the other: enough to hide its start, few enough to even out its end."""
        return min(8, pl.cdiv(self.rows * self.plan.blocks, BLOCKS))

    @property
    def scores(self) -> tuple[str, ...]:
        return SCORES_ALONE if self.settings.alpha is None else SCORES

    @property
    def arrays(self) -> int:
        return 1 if self.settings.alpha is None else 2


def _call(job, logits, targets, factor_dtype, interpret):
    plan, shared = job.plan, functools.partial(plgpu.SMEM, dtype=jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_score_rows, job),
        out_type=[jax.ShapeDtypeStruct((job.rows,), jnp.float32) for _ in job.scores]
        + [jax.ShapeDtypeStruct((job.rows, job.tiles, LANES), factor_dtype) for _ in job.factors],
        grid=(pl.cdiv(job.rows, job.rows_each),),
        grid_names=("clusters",),
        cluster=(plan.blocks,),
        cluster_names=("blocks",),
        num_threads=plan.warpgroups,
        thread_name="warpgroups",
        scratch_types={
            "logits": shared((job.arrays, plan.warpgroups, plan.tiles, LANES)),
            "partials": shared((2, plan.parts, LANES)),
            "workspace": shared((plan.warpgroups, 4)),
            "loaded": plgpu.Barrier(num_arrivals=job.arrays * plan.chunks, num_barriers=plan.warpgroups),
            "met": plgpu.Barrier(num_arrivals=plan.warpgroups),
        },
        # Warpgroup semantics, the default since JAX 0.11, are not complete in 0.10.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_interpreter() if interpret is True else interpret,
    )
    results = kernel(*logits, targets)
    count = len(job.scores)
    return dict(zip(job.scores, results[:count], strict=True)), dict(zip(job.factors, results[count:], strict=True))


def _score_rows(job, *refs, **scratch) -> None:
    """What every warpgroup runs."""
    part = _Part(job, refs, **scratch)
    first = lax.axis_index("clusters") * job.rows_each
    end = jnp.minimum(first + job.rows_each, job.rows)
    lax.fori_loop(0, job.plan.chunks, lambda j, _: part.load(first, j), None)
    part.meet()  # A block's memory may be written to only once the block runs.
    lax.fori_loop(first, end, lambda row, _: part.score_row(row, row + 1 < end), None)


class _Part:
    """A warpgroup's part of the row: `plan.tiles` tiles from `first_tile` on.

    Only this warpgroup touches its `logits` in shared memory, so they need no order but its own. What the parts tell
    each other goes through `partials`: every block has a full copy, and every part writes its own line of all copies,
    of [0] before and of [1] after the row's first meeting, to be read after the first and after the second. A part
    rewrites its line of [0] when it has left the second meeting, to which all came after reading [0]; and its line of
    [1] when it has left the next row's first meeting, to which all came after reading [1]. After the last meeting
    nobody writes to another block, so a block may end.
    """

    def __init__(self, job, refs, *, logits, partials, workspace, loaded, met):
        self.job, self.plan, self.settings = job, job.plan, job.settings
        self.sources, self.targets, outputs = refs[: job.arrays], refs[job.arrays], refs[job.arrays + 1 :]
        self.scores, self.factors = outputs[: len(job.scores)], outputs[len(job.scores) :]
        warpgroup = lax.axis_index("warpgroups")
        self.index = lax.axis_index("blocks") * self.plan.warpgroups + warpgroup
        self.first_tile = self.index * self.plan.tiles
        self.logits = [logits.at[i, warpgroup] for i in range(job.arrays)]
        self.partials, self.workspace = partials, workspace.at[warpgroup]
        self.loaded, self.met = loaded.at[warpgroup], met

    def load(self, row, j) -> None:
        """Starts the copies of a chunk. What lies past the end of the row arrives as zeros."""
        here, there = _chunk(j), pl.ds(self.first_tile + j * CHUNK, CHUNK)
        for source, logits in zip(self.sources, self.logits, strict=True):
            plgpu.copy_gmem_to_smem(source.at[row, there], logits.at[here], self.loaded)

    def score_row(self, row, another) -> None:
        target = self.targets[row]
        plgpu.barrier_wait(self.loaded)
        normalisers, found = self.normalise(target)
        sums = self.sum_entries(normalisers)
        log_probs = [jnp.maximum(x - top, rows.LOG_ZERO) for x, top in zip(found, normalisers, strict=True)]
        scores = [log_probs[0], sums[0], normalisers[0], *log_probs[1:], *sums[1:], *normalisers[1:]]

        @pl.when(self.index == 0)
        def _():
            for score, ref in zip(scores, self.scores, strict=True):
                ref[row] = score

        def finish(j, _):
            self.write_factors(row, j, target, found[0], sums)
            # The copy engine must come after this warpgroup's own reads and writes of the chunk.
            plgpu.commit_smem()
            pl.when(another)(lambda: self.load(row + 1, j))

        lax.fori_loop(0, self.plan.chunks, finish, None)

    def normalise(self, target):
        """First sweeps: the normalisers, and the target's scaled logits."""
        largest = [self.reduce("max", x) for x in self.sweep(self.scale, LOWEST, self.job.arrays)]

        def add_exponentials(j, totals):
            return [
                sum_ + jnp.exp(x[_chunk(j)] - top) for sum_, x, top in zip(totals, self.logits, largest, strict=True)
            ]

        totals = [self.reduce("add", x) for x in self.sweep(add_exponentials, 0.0, self.job.arrays)]
        column = target - self.first_tile * LANES
        mine = (column >= 0) & (column < self.plan.tiles * LANES)
        column = jnp.where(mine, column, 0)
        found = [jnp.where(mine, x[column // LANES, column % LANES], -jnp.inf) for x in self.logits]
        told, arrays = self.exchange(0, [*largest, *totals, *found]), range(self.job.arrays)
        normalisers = [_normaliser(told(i), told(len(arrays) + i)) for i in arrays]
        return normalisers, [functools.reduce(jnp.maximum, told(2 * len(arrays) + i)) for i in arrays]

    def scale(self, j, largest):
        here, counts = _chunk(j), self.columns(j * CHUNK, CHUNK) < self.job.limit
        for i, logits in enumerate(self.logits):
            logits[here] = scaled = jnp.where(counts, _scale(logits[here], self.settings), -jnp.inf)
            largest[i] = jnp.maximum(largest[i], scaled)
        return largest

    def sum_entries(self, normalisers):
        """Second sweep: entropy, divergence, Σ influence. Where the logits were it leaves influence and p."""
        sums = self.sweep(functools.partial(self.add_entries, normalisers), 0.0, 2 * self.job.arrays - 1)
        told = self.exchange(1, [self.reduce("add", x) for x in sums])
        return [functools.reduce(jnp.add, told(k)) for k in range(len(sums))]

    def add_entries(self, normalisers, j, sums):
        here = _chunk(j)
        scaled = [x[here] for x in self.logits]
        ls, *lt = [jnp.maximum(x - top, rows.LOG_ZERO) for x, top in zip(scaled, normalisers, strict=True)]
        terms = rows.divergence_terms(ls, *lt, self.settings) if lt else None
        p, added = (terms.p, [terms.entries, terms.influence]) if terms else (jnp.exp(ls), [])
        slope = _slope(scaled[0], self.settings)
        if "divergence" in self.job.factors:
            self.logits[0][here] = terms.influence * slope
        if self.job.factors:
            self.logits[-1][here] = p * slope
        return [x + y for x, y in zip(sums, [-p * ls, *added], strict=True)]

    def write_factors(self, row, j, target, found, sums) -> None:
        """Last sweep: the chunk's factors, tile by tile where the row ends within the chunk."""
        stored = self.job.tiles - self.first_tile
        write = functools.partial(self.write_tiles, row, target, found, sums)

        @pl.when((j + 1) * CHUNK <= stored)
        def _():
            write(j * CHUNK, CHUNK)

        @pl.when((j + 1) * CHUNK > stored)
        def _():
            lax.fori_loop(j * CHUNK, jnp.maximum(stored, j * CHUNK), lambda tile, _: write(tile, 1), None)

    def write_tiles(self, row, target, found, sums, tile, count) -> None:
        here, there = pl.ds(tile, count), pl.ds(self.first_tile + tile, count)
        for name, ref in zip(self.job.factors, self.factors, strict=True):
            p = self.logits[-1][here]
            if name == "divergence":
                factor = self.logits[0][here] - p * sums[2]
            else:
                factor = jnp.where(self.columns(tile, count) == target, _slope(found, self.settings), 0.0) - p
            ref[row, there] = factor.astype(ref.dtype)

    def sweep(self, step, initial, count):
        """Folds `step(j, carry)` over the chunks; the carry is a list of `count` arrays [CHUNK, LANES]."""
        carry = [self.spread(jnp.full((CHUNK, LANES), initial, jnp.float32))] * count
        return lax.fori_loop(0, self.plan.chunks, lambda j, carry: step(j, list(carry)), carry)

    def columns(self, tile, count):
        """Token ids of some tiles, [count, LANES]."""
        down, across = (self.spread(lax.broadcasted_iota(jnp.int32, (count, LANES), axis)) for axis in (0, 1))
        return (self.first_tile + tile + down) * LANES + across

    def exchange(self, phase, values):
        """Tells all parts some numbers; returns what gives for the k-th of them the list of what the parts told."""
        lane = self.spread(lax.broadcasted_iota(jnp.int32, (LANES,), 0))
        line = self.spread(jnp.zeros((LANES,), jnp.float32))
        for k, value in enumerate(values):
            line = jnp.where(lane == k, value, line)
        for block in range(self.plan.blocks):
            copy = plgpu.cluster_ref(self.partials, {"blocks": block}) if self.plan.blocks > 1 else self.partials
            copy[phase, self.index] = line
        self.meet()
        return lambda k: [self.partials[phase, part, k] for part in range(self.plan.parts)]

    def meet(self) -> None:
        """Returns when all parts of the row have come; then all see what any of them had written."""
        if self.plan.blocks == 1:
            plgpu.barrier_arrive(self.met)
            plgpu.barrier_wait(self.met)
            return

        # All threads of all blocks arrive, which releases, and wait, which acquires, at cluster scope (barrier.cluster
        # of PTX). The wait of Pallas' own ClusterBarrier acquires at block scope, which promises nothing about writes
        # from other blocks.
        @plgpu.inline_mgpu()
        def meet(_):
            from jaxlib.mlir.dialects import nvvm

            nvvm.cluster_arrive()
            nvvm.cluster_wait()

        meet()

    def reduce(self, operation, values):
        """Sum ("add") or maximum ("max") of an array [CHUNK, LANES], a scalar."""
        if self.job.interpret:
            return jnp.sum(values) if operation == "add" else jnp.max(values)

        # Pallas' own reduction to a scalar has one workspace per block, so it refuses blocks of several warpgroups.
        @plgpu.inline_mgpu(
            arg_types=(_layout(values.shape), plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT(())),
        )
        def reduce(_, values, workspace):
            return values.reduce(operation, (0, 1), workspace)

        return reduce(values, self.workspace)

    def spread(self, values):
        """Divides a new array over the threads as a load from shared memory does; for an interpreter it is whole."""
        return values if self.job.interpret else plgpu.layout_cast(values, _layout(values.shape))


def _chunk(j):
    return pl.ds(j * CHUNK, CHUNK)


def _layout(shape):
    """Of a float32 array loaded from shared memory: as many columns per thread at once as fit 8 bytes."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=2 if len(shape) == 2 and shape[0] % 2 == 0 else 1)


def _interpreter():
    try:
        parameters = plgpu.InterpretGPUParams
    except AttributeError:  # JAX 0.10 has it, but not yet in public.
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as parameters
    return parameters(out_of_bounds_reads="uninitialized")


def _scale(logits, settings):
    if settings.soft_cap is not None:
        logits = settings.soft_cap * jnp.tanh(logits / settings.soft_cap)
    return logits if settings.temperature == 1 else logits / settings.temperature


def _slope(scaled, settings):
    """temperature · ∂scaled/∂logits, from the scaled logits; under a soft cap 0 on padding."""
    if settings.soft_cap is None:
        return 1.0
    squashed = jnp.maximum(scaled * (settings.temperature / settings.soft_cap), -1.0)
    return 1 - squashed * squashed


def _normaliser(largest, totals):
    """log Σ exp of a row, from each part's largest logit and its Σ exp(logit − largest)."""
    top = functools.reduce(jnp.maximum, largest)
    total = sum(x * jnp.exp(y - top) for x, y in zip(totals, largest, strict=True))
    return top + jnp.log(total)
