"""The EMA teacher: a float32 average of the student's effective weights (UniSD Eq. 3).

θ̄ ← β·θ̄ + (1−β)·θ. For full weights this is leaf by leaf. For adapters the effective weight is W + scale·A·B, and W is
shared, so the average is that of the products A·B: averaging A and B one by one would give another matrix. The exact
average β·Ā·B̄ + (1−β)·A·B is written as one product of stacked factors and brought back to the teacher's rank by a
singular value decomposition, which loses the least possible energy; how much is lost is returned and logged. The
teacher's rank is twice the student's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unisd_jax.models.lora import Lora, LoraFactors

RANK_MULTIPLE = 2
# A TPU multiplies float32 in bfloat16 unless told otherwise, which would undo an average in float32.
EXACT = jax.lax.Precision.HIGHEST


def start_ema(student: Any, *, dtype: Any = jnp.float32) -> Any:
    """The teacher before any update: equal to the student's starting point, kept in `dtype`.

    The release keeps it in bfloat16, where updates below half a unit in the last place vanish; float32 keeps them.

    An adapter's factors are filled up with zeros to the teacher's larger rank, which leaves their product as it is.
    """
    if not isinstance(student, Lora):
        return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), student)

    def widen(factors: LoraFactors) -> LoraFactors:
        *layers, inputs, rank = factors.a.shape
        outputs = factors.b.shape[-1]
        more = min(RANK_MULTIPLE * rank, inputs, outputs) - rank
        zeros = LoraFactors(jnp.zeros((*layers, inputs, more)), jnp.zeros((*layers, more, outputs)))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), _stack(factors, zeros, 1.0, 1.0))

    return Lora({path: widen(factors) for path, factors in student.factors.items()}, student.scale)


def ema_update(teacher: Any, student: Any, *, decay: float) -> Any:
    """θ̄ ← decay·θ̄ + (1−decay)·θ in the dtype of θ̄; adapters are averaged as effective weights at the teacher's rank."""
    return ema_update_measured(teacher, student, decay=decay)[0]


def ema_update_measured(teacher: Any, student: Any, *, decay: float) -> tuple[Any, Float[Array, ""]]:
    """`ema_update`, and the share of the averaged adapter's squared Frobenius norm that its rank could not hold."""
    if not isinstance(teacher, Lora):
        return jax.tree.map(lambda old, new: _average(old, new, decay), teacher, student), jnp.float32(0.0)
    factors, lost, total = {}, jnp.float32(0.0), jnp.float32(0.0)
    for path, old in teacher.factors.items():
        exact, path_lost, path_total = _average_products(old, student.factors[path], decay)
        factors[path] = jax.tree.map(lambda new, like: new.astype(like.dtype), exact, old)
        lost, total = lost + path_lost, total + path_total
    return Lora(factors, teacher.scale), lost / jnp.maximum(total, 1e-30)


def _average(old: Float[Array, "*S"], new: Float[Array, "*S"], decay: float) -> Float[Array, "*S"]:
    """One weight's average in the dtype of `old`, rounded after the product and after the sum, as in place."""
    kept = (decay * old.astype(jnp.float32)).astype(old.dtype).astype(jnp.float32)
    return (kept + (1 - decay) * new.astype(jnp.float32)).astype(old.dtype)


def weight_distance(teacher: Any, student: Any) -> Float[Array, ""]:
    """‖θ̄ − θ‖ / ‖θ‖ over effective weights; for adapters over the products A·B alone, the frozen part left out."""
    if isinstance(teacher, Lora):
        pairs = [(teacher.factors[path], student.factors[path]) for path in student.factors]
        apart = sum(_squared_distance(old, new) for old, new in pairs)
        size = sum(_squared_norm(new) for _, new in pairs)
    else:
        leaves = list(zip(jax.tree.leaves(teacher), jax.tree.leaves(student), strict=True))
        leaves = [(old.astype(jnp.float32), new.astype(jnp.float32)) for old, new in leaves]
        apart = sum(jnp.sum(jnp.square(old - new)) for old, new in leaves)
        size = sum(jnp.sum(jnp.square(new)) for _, new in leaves)
    return jnp.sqrt(jnp.maximum(apart, 0.0) / jnp.maximum(size, 1e-30))


def _average_products(old: LoraFactors, new: LoraFactors, decay: float):
    """(factors, lost energy, energy) of the exact average at the rank of `old`."""
    rank = old.a.shape[-1]
    # One matrix at a time: JAX hands a batch of LAPACK calls to the thread pool that runs the program itself, and two
    # such batches at once wait for each other for ever on a machine with two cores (seen with jax 0.10.2).
    a, b, lost, total = jax.lax.map(lambda exact: _truncate(exact, rank), _stack(old, new, decay, 1 - decay))
    return LoraFactors(a, b), jnp.sum(lost), jnp.sum(total)


def _truncate(exact: LoraFactors, rank: int):
    """The best factors of `rank` for one product: QR of both sides, SVD of the small core."""
    left, left_core = jnp.linalg.qr(exact.a)
    right, right_core = jnp.linalg.qr(exact.b.T)
    u, s, v = jnp.linalg.svd(jnp.matmul(left_core, right_core.T, precision=EXACT), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    a = jnp.matmul(left, u[:, :rank], precision=EXACT) * root
    b = root[:, None] * jnp.matmul(v[:rank], right.T, precision=EXACT)
    return a, b, jnp.sum(jnp.square(s[rank:])), jnp.sum(jnp.square(s))


def _stack(old: LoraFactors, new: LoraFactors, old_weight: float, new_weight: float) -> LoraFactors:
    """Factors of old_weight·A₁·B₁ + new_weight·A₂·B₂."""
    a = jnp.concatenate([old.a.astype(jnp.float32), new.a.astype(jnp.float32)], axis=-1)
    b = jnp.concatenate([old_weight * old.b.astype(jnp.float32), new_weight * new.b.astype(jnp.float32)], axis=-2)
    return LoraFactors(a, b)


def _squared_norm(factors: LoraFactors) -> Float[Array, ""]:
    """‖A·B‖² = Σ (AᵀA) ∘ (B·Bᵀ), without forming A·B."""
    left = jnp.matmul(jnp.swapaxes(factors.a, -1, -2), factors.a, precision=EXACT)
    right = jnp.matmul(factors.b, jnp.swapaxes(factors.b, -1, -2), precision=EXACT)
    return jnp.sum(left * right)


def _squared_distance(old: LoraFactors, new: LoraFactors) -> Float[Array, ""]:
    """‖A₁·B₁ − A₂·B₂‖², one layer's product at a time: of `_squared_norm` only rounding is left where they are near."""
    difference = _stack(old, new, 1.0, -1.0)
    layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), difference)
    norms = jax.lax.map(lambda one: jnp.sum(jnp.square(jnp.matmul(one.a, one.b, precision=EXACT))), layers)
    return jnp.sum(norms)
