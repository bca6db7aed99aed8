"""Model FLOPs, held against known sizes and against sums over single tokens."""

import pytest

from unisd_jax.models import ModelConfig
from unisd_jax.models.flops import body_flops, head_flops, layer_weights, peak_flops
from unisd_jax.testing import tiny_config

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_qwen2_5_7b_has_the_parameters_its_card_says():
    """6.53 billion without embeddings."""
    config = ModelConfig.from_hf(QWEN_7B)
    assert config.num_layers * layer_weights(config) == pytest.approx(6.53e9, rel=1e-3)
    assert body_flops(config, [1]) == pytest.approx(2 * 6.53e9, rel=1e-3)
    assert head_flops(config, 10) == 2 * 152064 * 3584 * 10


def test_attention_sees_the_past_only():
    config = tiny_config(num_layers=1)
    per_pair = 4 * config.num_heads * config.head_dim
    for length in (1, 2, 7):
        attention = body_flops(config, [length]) - length * 2 * layer_weights(config)
        assert attention == per_pair * sum(range(1, length + 1))
    assert body_flops(config, [3, 5]) == body_flops(config, [3]) + body_flops(config, [5])


def test_a_window_bounds_what_is_seen():
    config = tiny_config(num_layers=2, sliding_window=4, sliding_layers=(True, False))
    whole = tiny_config(num_layers=2)
    saved = body_flops(whole, [9]) - body_flops(config, [9])
    pairs = sum(min(place, 4) for place in range(1, 10))
    assert saved == 4 * config.num_heads * config.head_dim * (45 - pairs)
    assert body_flops(config, [4]) == body_flops(whole, [4])


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H200", 989e12), ("TPU v6 lite", 918e12), ("TPU v5p", 459e12), ("cpu", None)]
)
def test_peaks_are_found_by_the_device_s_name(kind, peak):
    assert peak_flops(kind) == peak
