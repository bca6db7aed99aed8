"""Scores of tokens as one Hopper kernel (Mosaic GPU): logits live in registers and are never written to memory.

Two warpgroups multiply 64 rows each of a [128, 256] tile of logits while a third fetches the next pieces of both
operands. After each tile they fold its logits into four numbers per row. Blocks divide the rows and the vocabulary
between them; what the parts of the vocabulary say of a row is merged at the end.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from unisd_jax.kernels.fused_linear_logprob.reference import LogprobScores

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # jax 0.10 needs absl-py for it, which it does not ask for
    plgpu = None

# Everything inside is in units of log 2, because the hardware's exponential is 2^x.
LOG2E = math.log2(math.e)
# Stands in for a logit of -inf: finite, so that differences and products with 0 are numbers.
LOWEST = -1e30
# Differences below this are 2^x = 0 all the same; the limit keeps a logit of -inf from making 0 · inf.
FARTHEST = -4096.0

ROWS, TILE, DEPTH = 64, 256, 64  # of one warpgroup's product: rows, vocabulary columns, and hidden entries per step
GROUPS = 2  # warpgroups that multiply; one more fetches
STAGES = 4  # 48 KiB each
# Blocks of rows that run at the same time share the head's tiles; this many keep their hidden states in L2 meanwhile.
BLOCKS_TOGETHER = 16
MULTIPROCESSORS = 132
# Both operands are read in swizzled pieces of 8 rows.
SWIZZLE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a call before it runs: `columns` of the vocabulary count, the rest of the head is padding.

    Rows come in `blocks` of GROUPS · ROWS, the vocabulary in `splits` parts of `tiles_per_split` tiles or fewer.
    """

    tokens: int
    columns: int
    width: int
    tiles_per_split: int
    temperature: float
    soft_cap: float | None
    emulate_products: bool = False

    blocks = property(lambda self: pl.cdiv(self.tokens, GROUPS * ROWS))
    tiles = property(lambda self: pl.cdiv(self.columns, TILE))
    splits = property(lambda self: pl.cdiv(self.tiles, self.tiles_per_split))
    steps = property(lambda self: self.width // DEPTH)


def available() -> bool:
    """Whether this jax can build Mosaic GPU kernels."""
    return plgpu is not None


def supports(hidden: jax.Array, head: jax.Array) -> bool:
    """Whether `score_tokens` takes these arrays here; the card must be a Hopper one besides."""
    return available() and not _problem(hidden, head)


def score_tokens(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    interpret: bool = False,
) -> LogprobScores:
    """Scores of N tokens; see `reference.score_tokens`.

    Args:
      hidden: [N, H] bfloat16, H a multiple of 64.
      head: [V, H] bfloat16. It is copied where V is not a multiple of 8.
      targets: [N] token ids. One outside the vocabulary gets a NaN log-prob.
      temperature: divides the logits; a Python number.
      soft_cap: logits become soft_cap · tanh(logits / soft_cap) before that.
      vocab_size: rows of the head from here on are padding.
      interpret: simulate the kernel on the CPU, slowly.

    Returns:
      `LogprobScores(logp, entropy)`, each float32 [N], in nats.

    Raises:
      RuntimeError: jax.experimental.pallas.mosaic_gpu cannot be imported.
      ValueError: arrays that the kernel does not take.
    """
    if not available():
        raise RuntimeError(f"jax {jax.__version__} cannot import jax.experimental.pallas.mosaic_gpu; it needs absl-py")
    if problem := _problem(hidden, head):
        raise ValueError(problem)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets are {targets.shape}; expected {hidden.shape[:1]}, one per row of hidden")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least 1")
    columns = head.shape[0] if vocab_size is None else min(vocab_size, head.shape[0])
    if hidden.shape[0] == 0:
        return LogprobScores(jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32))
    plan = make_plan(hidden.shape[0], columns, hidden.shape[1], temperature, soft_cap)
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        plan = dataclasses.replace(plan, emulate_products=True)
    valid = (targets >= 0) & (targets < columns)
    parts = _launch(hidden, head, jnp.where(valid, targets, -1).astype(jnp.int32), plan, interpret)
    scores = merge(parts[:, :, : plan.tokens])
    return scores._replace(logp=jnp.where(valid, scores.logp, jnp.nan))


def _problem(hidden, head) -> str | None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] == 0:
        return f"hidden is {hidden.shape} and head {head.shape}; expected [N, H] and [V, H], V > 0"
    if hidden.dtype != jnp.bfloat16 or head.dtype != jnp.bfloat16:
        return f"hidden is {hidden.dtype} and head {head.dtype}; expected bfloat16"
    if hidden.shape[1] % DEPTH or hidden.shape[1] == 0:
        return f"hidden is {hidden.shape} and head {head.shape}; expected H to be a multiple of {DEPTH}"
    return None


def make_plan(tokens: int, columns: int, width: int, temperature: float, soft_cap: float | None) -> Plan:
    """The division of the vocabulary that ends first if all tiles take the same time."""
    plan = Plan(tokens, columns, width, pl.cdiv(columns, TILE), temperature, soft_cap)

    def duration(tiles_per_split: int) -> float:
        """In tiles; a block takes half a tile's time to start."""
        divided = dataclasses.replace(plan, tiles_per_split=tiles_per_split)
        return pl.cdiv(plan.blocks * divided.splits, MULTIPROCESSORS) * (tiles_per_split + 0.5)

    # With few parts the blocks that run together are of too many rows for L2.
    longest = max(1, plan.tiles * BLOCKS_TOGETHER // MULTIPROCESSORS)
    best = min(range(longest, 0, -1), key=duration)
    return dataclasses.replace(plan, tiles_per_split=best)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _launch(hidden, head, targets, plan: Plan, interpret: bool):
    """What each part of the vocabulary says of each row, [splits, 4, rows] float32; rows are padded to whole blocks."""
    rows = plan.blocks * GROUPS * ROWS
    targets = jnp.pad(targets, (0, rows - plan.tokens), constant_values=-1)
    hidden, head = (jnp.pad(array, ((0, -len(array) % SWIZZLE_ROWS), (0, 0))) for array in (hidden, head))
    # Which tiles hold a target of which rows: most hold none, and the kernel then need not look for it.
    tile_of_target = jnp.where(targets < 0, plan.tiles, targets // TILE)
    has_target = jnp.zeros((rows // ROWS, plan.tiles), jnp.int32)
    has_target = has_target.at[jnp.arange(rows) // ROWS, tile_of_target].set(1, mode="drop")
    layout = (plgpu.TilingTransform((SWIZZLE_ROWS, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH))
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((plan.splits, 4, rows), jnp.float32),
        grid=(plan.blocks * plan.splits,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((STAGES, GROUPS * ROWS, DEPTH), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((STAGES, TILE, DEPTH), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((GROUPS, ROWS), jnp.int32),
            plgpu.SMEM((GROUPS, 4, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=_simulator() if interpret else None,
    )(hidden, head, targets, has_target)


def _simulator():
    """Parameters of the simulation: like TMA it reads zeros outside of an array."""
    if hasattr(plgpu, "InterpretGPUParams"):
        parameters = plgpu.InterpretGPUParams
    else:  # jax 0.10 has it, but not under a public name
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as parameters
    return parameters(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")


def _kernel(hidden, head, targets, has_target, out, hidden_tiles, head_tiles, wanted, results, *barriers, plan: Plan):
    """One block: GROUPS · ROWS rows and one part of the vocabulary."""
    ready, used, copied = barriers
    group = lax.axis_index("group")
    block, split = _position(lax.axis_index("block"), plan)
    first_tile = split * plan.tiles_per_split
    count = jnp.minimum(plan.tiles - first_tile, plan.tiles_per_split)

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _fetch(hidden, head, hidden_tiles, head_tiles, ready, used, block, first_tile, count, plan)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        part = block * GROUPS + group
        rows = pl.ds(part * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(targets.at[rows], wanted.at[group], copied.at[group])
        plgpu.barrier_wait(copied.at[group])
        mine = wanted[group]

        def tile(index, sums):
            here = has_target[part, first_tile + index] > 0
            products = _multiply(hidden_tiles, head_tiles, ready, used, group, index, plan)
            return fold(sums, products, (first_tile + index) * TILE, mine, here, plan)

        for number, values in enumerate(lax.fori_loop(0, count, tile, empty_sums())):
            results[group, number] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(results.at[group], out.at[split, :, rows])
        plgpu.wait_smem_to_gmem(0)


def _position(index, plan: Plan):
    """(block of rows, part of the vocabulary) of a place in the grid: BLOCKS_TOGETHER blocks take all parts first."""
    together = BLOCKS_TOGETHER * plan.splits
    first = lax.div(index, together) * BLOCKS_TOGETHER
    blocks = jnp.minimum(plan.blocks - first, BLOCKS_TOGETHER)
    inside = lax.rem(index, together)
    return first + lax.rem(inside, blocks), lax.div(inside, blocks)


def _fetch(hidden, head, hidden_tiles, head_tiles, ready, used, block, first_tile, count, plan: Plan) -> None:
    """Fill the stages in the order in which they are multiplied, each as soon as both warpgroups are done with it."""
    total = count * plan.steps

    def fetch(step, _):
        slot = lax.rem(step, STAGES)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(used.at[slot]))
        depth = pl.ds(lax.rem(step, plan.steps) * DEPTH, DEPTH)
        rows = pl.ds(block * GROUPS * ROWS, GROUPS * ROWS)
        columns = pl.ds((first_tile + lax.div(step, plan.steps)) * TILE, TILE)
        plgpu.copy_gmem_to_smem(hidden.at[rows, depth], hidden_tiles.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(head.at[columns, depth], head_tiles.at[slot], ready.at[slot])

    lax.fori_loop(0, total, fetch, None)
    # A block may not end while a barrier still expects someone to wait for it.
    last = jnp.maximum(total - STAGES, 0)
    lax.fori_loop(last, total, lambda step, _: plgpu.barrier_wait(used.at[lax.rem(step, STAGES)]), None)


def _multiply(hidden_tiles, head_tiles, ready, used, group, index, plan: Plan):
    """A warpgroup's logits of tile `index` of its part, [ROWS, TILE] float32."""
    rows = pl.ds(group * ROWS, ROWS)

    def slot_of(step):
        return lax.rem(index * plan.steps + step, STAGES)

    def multiply(total):
        def step(step, _):
            slot = slot_of(step)
            plgpu.barrier_wait(ready.at[slot])
            plgpu.wgmma(total, hidden_tiles.at[slot, rows], _transposed(head_tiles.at[slot]))
            # One product stays in flight, so that the tensor cores never wait for the next step to be issued.
            plgpu.wgmma_wait(1)
            pl.when(step > 0)(lambda: plgpu.barrier_arrive(used.at[slot_of(step - 1)]))

        lax.fori_loop(0, plan.steps, step, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(used.at[slot_of(plan.steps - 1)])
        return total[...]

    def emulate(step, total):
        slot = slot_of(step)
        plgpu.barrier_wait(ready.at[slot])
        total += jnp.dot(hidden_tiles[slot, rows], head_tiles[slot].T, preferred_element_type=jnp.float32)
        plgpu.barrier_arrive(used.at[slot])
        return total

    if plan.emulate_products:  # the simulator of jax 0.10 has no product with a transposed operand
        return lax.fori_loop(0, plan.steps, emulate, jnp.zeros((ROWS, TILE), jnp.float32))
    return pl.run_scoped(multiply, plgpu.ACC((ROWS, TILE), jnp.float32))


def _transposed(tile):
    return tile.transpose((1, 0)) if hasattr(plgpu, "InterpretGPUParams") else plgpu.transpose_ref(tile, (1, 0))


def empty_sums() -> tuple:
    """`fold` of no columns."""
    zero = jnp.zeros((ROWS,), jnp.float32)
    return jnp.full((ROWS,), LOWEST, jnp.float32), zero, zero, zero


def fold(sums, products, first_column, targets, has_target, plan: Plan) -> tuple:
    """Add one tile of logits to what is known of its rows.

    Args:
      sums: of s, the logits times log2 e: the largest m so far; Σ 2^(s−m); Σ 2^(s−m) (s−m); the target's, each [ROWS].
      products: hidden @ head.T of the tile, [ROWS, TILE].
      first_column: token id of its first column.
      targets: token id per row, [ROWS]; -1 for none.
      has_target: whether a column of the tile is a target of some row.
      plan: of the call.
    """
    largest, total, spread, found = sums
    scaled = _scale(products, plan)
    column = lax.broadcasted_iota(jnp.int32, scaled.shape, 1)

    def across(values):
        return lax.broadcast_in_dim(values, scaled.shape, (0,))

    def masked():
        return jnp.where(column < plan.columns - first_column, scaled, LOWEST)

    def with_target():
        return found + jnp.sum(jnp.where(column == across(targets - first_column), scaled, 0.0), axis=1)

    scaled = lax.cond(first_column + TILE > plan.columns, masked, lambda: scaled)
    found = lax.cond(has_target, with_target, lambda: found)
    highest = jnp.maximum(largest, jnp.max(scaled, axis=1))
    below = jnp.maximum(scaled - across(highest), FARTHEST)
    power = jnp.exp2(below)
    drop = jnp.maximum(largest - highest, FARTHEST)
    shrink = jnp.exp2(drop)
    spread = shrink * (spread + total * drop) + jnp.sum(power * below, axis=1)
    return highest, shrink * total + jnp.sum(power, axis=1), spread, found


def _scale(products, plan: Plan):
    factor = LOG2E / plan.temperature
    if plan.soft_cap is None:
        return products * factor
    # The hardware's tanh is good to three digits only; this form errs by 1e-7 · soft_cap.
    squashed = 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E / plan.soft_cap)))
    return squashed * (plan.soft_cap * factor)


def merge(parts: jax.Array) -> LogprobScores:
    """Scores from the sums of each part of the vocabulary, [splits, 4, N]."""
    largest, total, spread, found = (parts[:, number] for number in range(4))
    drop = jnp.maximum(largest - jnp.max(largest, axis=0), FARTHEST)
    shrink = jnp.exp2(drop)
    spread = jnp.sum(shrink * (spread + total * drop), axis=0)
    total = jnp.sum(shrink * total, axis=0)
    # Each target lies in one part, the others found 0.
    logp = (jnp.sum(found, axis=0) - jnp.max(largest, axis=0)) / LOG2E - jnp.log(total)
    return LogprobScores(logp, jnp.log(total) - spread / total / LOG2E)
