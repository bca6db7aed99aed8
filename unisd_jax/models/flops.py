"""Model FLOPs: what the mathematics needs, without recomputation and padding.

A product of [m, k] and [k, n] counts 2·m·k·n.
"""

from collections.abc import Iterable

from unisd_jax.models.config import ModelConfig

# Dense bfloat16 peaks of one chip in FLOP/s, from the makers' data sheets; by a part of jax's device_kind.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The bfloat16 peak of a chip in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name.lower() in device_kind.lower()), None)


def layer_weights(config: ModelConfig) -> int:
    """Entries of the matrices of one layer."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def body_flops(config: ModelConfig, lengths: Iterable[int]) -> int:
    """One forward pass of all layers over sequences of these lengths; attention sees each token's past only."""
    lengths, windows = list(lengths), layer_windows(config)
    products = 2 * len(windows) * layer_weights(config) * sum(lengths)
    seen = sum(_pairs(length, window) for length in lengths for window in windows)
    return products + 4 * config.num_heads * config.head_dim * seen


def head_flops(config: ModelConfig, tokens: int) -> int:
    """The output matrix over so many tokens."""
    return 2 * config.vocab_size * config.hidden_size * tokens


def layer_windows(config: ModelConfig) -> list[int | None]:
    """How many tokens each layer's attention sees; None: all before."""
    slides = config.sliding_layers or (False,) * config.num_layers
    return [config.sliding_window if sliding else None for sliding in slides]


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
