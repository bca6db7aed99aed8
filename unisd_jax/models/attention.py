"""Grouped-query attention: in plain XLA, or by cuDNN's and TPU's fused kernels, which hold no [S, S] array either."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from unisd_jax.errors import UserError
from unisd_jax.models.layout import ACTIVATIONS, fitting_spec

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
# Finite, so that a row with every key masked (a padded query) gives garbage nobody reads instead of NaN.
MASKED_SCORE = -1e30
# Queries are taken in blocks of at least this many and in no more blocks than this: each is compiled by itself.
CAUSAL_BLOCK, MOST_BLOCKS = 256, 8
# Sequences longer than this form the scores of each block again for the gradient.
KEPT_LENGTH = 1024
# What cuDNN's flash attention takes (before compute capability 9.0 smaller heads), and how wide a TPU's registers are.
CUDNN_DTYPES, CUDNN_MULTIPLE, CUDNN_HEAD_DIM, CUDNN_HEAD_DIM_BEFORE_HOPPER = (jnp.bfloat16, jnp.float16), 8, 256, 128
LANES = 128
SPLASH_BLOCKS = (512, 256, 128)


def resolve_attention(name: str, *, backend: str, dtype: Any, head_dim: int, capability: float = 9.0) -> str:
    """The implementation that `name` stands for on a backend ("cpu", "gpu" or "tpu"); `capability` is a GPU's.

    Raises:
      UserError: no such implementation, or one that cannot run there.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"model.attention is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    dtype = jnp.dtype(dtype)
    most = CUDNN_HEAD_DIM if capability >= 9.0 else CUDNN_HEAD_DIM_BEFORE_HOPPER
    fits_cudnn = dtype in CUDNN_DTYPES and head_dim % CUDNN_MULTIPLE == 0 and head_dim <= most
    if name == "auto":
        return {"gpu": "cudnn" if fits_cudnn else "xla", "tpu": "splash"}.get(backend, "xla")
    wanted = {"cudnn": "gpu", "splash": "tpu"}.get(name, backend)
    if backend != wanted:
        raise UserError(f"model.attention is {name}, which runs on {wanted} only, not on {backend}; use auto or xla")
    if name == "cudnn" and not fits_cudnn:
        raise UserError(
            f"model.attention is cudnn, which takes bfloat16 or float16 and a head_dim that is a multiple of "
            f"{CUDNN_MULTIPLE} and at most {most} on this GPU, not {dtype} and {head_dim}; use auto or xla"
        )
    return name


def causal_attention(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    scale: float,
    window: int | None = None,
    implementation: str = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B S N D"]:
    """softmax(scale · q·kᵀ) v where token i sees tokens i − window < j ≤ i, or all j ≤ i without a window.

    Of N query heads, N / K in a row share a key-value head. `implementation`: xla, cudnn, splash, or
    splash_interpret, which runs the TPU kernel's steps on any machine.
    """
    if implementation == "xla":
        return _in_blocks(query, key, value, scale=scale, window=window)
    if implementation == "cudnn":
        return _over_devices(functools.partial(_cudnn, scale=scale, window=window), query, key, value, mesh)
    interpret = {"splash": False, "splash_interpret": True}[implementation]
    kernel = functools.partial(_splash, scale=scale, window=window, interpret=interpret)
    return _over_devices(kernel, query, key, value, mesh)


def attention(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B K T D"],
    value: Float[Array, "B K T D"],
    attend: Bool[Array, "#B S T"],
    *,
    scale: float,
) -> Float[Array, "B S N D"]:
    """softmax(scale · q·kᵀ) v over the keys that `attend` allows; N query heads share K key-value heads.

    The query heads of one key head are laid end to end, so that both products are plain matrix products per key head.
    Scores and softmax are float32; the result has the dtype of `query`.
    """
    batch, length, heads, dim = query.shape
    kv_heads, groups = key.shape[1], heads // key.shape[1]
    rows = query.reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, groups * length, dim)
    scores = jnp.einsum("bkrd,bktd->bkrt", rows, key, preferred_element_type=jnp.float32)
    # Scaled in float32: the queries would first be rounded to their own dtype.
    scores = scale * scores.reshape(batch, kv_heads, groups, length, -1)
    scores = scores + jnp.where(attend, 0.0, MASKED_SCORE)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, kv_heads, groups * length, -1)
    mixed = jnp.einsum("bkrt,bktd->bkrd", weights, value).reshape(batch, kv_heads, groups, length, dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def within_window(attend: Bool[Array, "B S T"], window: int) -> Bool[Array, "B S T"]:
    """`attend` with only the last `window` allowed keys of each query, wherever they stand among the T slots."""
    later = jnp.cumsum(attend[..., ::-1], axis=-1)[..., ::-1]
    return attend & (later <= window)


def _in_blocks(query, key, value, *, scale: float, window: int | None):
    """Queries in blocks, each over the keys it can see: saves the products above the diagonal and before the window."""
    length = query.shape[1]
    size = max(CAUSAL_BLOCK, -(-length // MOST_BLOCKS))
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

    def block(query, key, value, *, start):
        end = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
        attend = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return attention(query[:, start:end], key[:, :, first:end], value[:, :, first:end], attend[None], scale=scale)

    blocks = []
    for start in range(0, length, size):
        mix = functools.partial(block, start=start)
        # It takes whole arrays, so that all blocks keep the same ones for the gradient and not a slice each.
        blocks.append((jax.checkpoint(mix) if length > KEPT_LENGTH else mix)(query, key, value))
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def _cudnn(query, key, value, *, scale: float, window: int | None):
    """cuDNN's flash attention; its window counts the tokens before the token itself, and it takes even lengths only."""
    length = query.shape[1]
    query, key, value = (jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    return mixed[:, :length]


def _splash(query, key, value, *, scale: float, window: int | None, interpret: bool):
    """The TPU kernel, for lengths and head sizes padded with zeros: later keys are never seen, zeros add nothing."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, dim = query.shape
    padded = -length % LANES
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, -dim % LANES))).swapaxes(1, 2) for x in (query * scale, key, value)
    )
    size = length + padded
    block = next(block for block in SPLASH_BLOCKS if size % block == 0)
    passes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    mask = splash.CausalMask((size, size)) if window is None else splash.LocalMask((size, size), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=splash.BlockSizes(**{f"block_{part}": block for part in passes}),
    )  # fmt: skip
    return jax.vmap(kernel)(query, key, value).swapaxes(1, 2)[:, :length, :, :dim].astype(query.dtype)


def _over_devices(kernel, query, key, value, mesh: Mesh | None):
    """`kernel` on each device's rows and heads: the compiler cannot divide a kernel by itself.

    Key-value heads that the devices outnumber are repeated until each device has those of its query heads.
    """
    if mesh is None:
        return kernel(query, key, value)
    spec = fitting_spec(ACTIVATIONS["heads"], query.shape, mesh)
    if spec[2] is not None:
        shards, kv_heads = mesh.shape[spec[2]], key.shape[2]
        key, value = (jnp.repeat(x, math.lcm(kv_heads, shards) // kv_heads, axis=2) for x in (key, value))
    return jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=PartitionSpec(*spec), check_vma=False)(
        query, key, value
    )
