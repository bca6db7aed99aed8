"""The families: configs in and out, what is refused, and the names of their tensors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx

from unisd_jax.errors import UserError
from unisd_jax.models import Model, ModelConfig
from unisd_jax.models.families import canonical_name, tensor_names
from unisd_jax.models.layers import GatedMLP, RMSNorm
from unisd_jax.models.rope import DynamicScaling, LinearScaling, Llama3Scaling
from unisd_jax.testing import tiny_config

GEMMA = dict(
    family="gemma3_text", tied_embeddings=True, query_scalar=24.0, rope_theta=1e6, sliding_window=12,
    sliding_layers=(True, False), local_rope_theta=1e4,
)  # fmt: skip
CONFIGS = {
    "llama": {},
    "llama31": dict(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64), rope_theta=500_000.0),
    "llama linear": dict(rope_scaling=LinearScaling(4.0)),
    "qwen2": dict(family="qwen2", attention_bias=True, tied_embeddings=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3": dict(family="qwen3", rope_theta=1e6),
    "gemma3": GEMMA,
    "gemma3 linear": GEMMA | dict(rope_scaling=LinearScaling(8.0)),
    "gemma3 full": dict(family="gemma3_text", tied_embeddings=True, query_scalar=16.0),
    "internlm3": dict(family="internlm3", rope_scaling=DynamicScaling(6.0, 512), attention_bias=True),
}
# The text_config of google/gemma-3-4b-it names no more than this.
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_config_survives_the_round_trip(changes):
    config = tiny_config(**changes)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(ModelConfig.from_hf(config.to_hf()))


def test_older_config_fields_are_understood():
    """rope_theta and rope_scaling beside each other, no head_dim, no num_key_value_heads."""
    hf = tiny_config().to_hf()
    for field in ("rope_parameters", "head_dim", "num_key_value_heads"):
        del hf[field]
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = ModelConfig.from_hf(hf | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert (config.rope_theta, config.head_dim, config.num_kv_heads) == (5e5, 8, 4)
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert ModelConfig.from_hf(hf | {"rope_scaling": None}).rope_scaling is None
    assert ModelConfig.from_hf(hf | {"rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == LinearScaling(
        2.0
    )


def test_a_gemma_with_a_vision_tower_is_its_text_model():
    config = ModelConfig.from_hf(GEMMA_4B)
    assert dataclasses.asdict(config) == dict(
        family="gemma3_text", vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_layers=34, num_heads=8,
        num_kv_heads=4, head_dim=256, norm_eps=1e-6, rope_theta=1e6, rope_scaling={"factor": 8.0},
        attention_bias=False, tied_embeddings=True, max_position=131072, query_scalar=256.0, sliding_window=1024,
        sliding_layers=tuple((layer + 1) % 6 > 0 for layer in range(34)), local_rope_theta=1e4,
    )  # fmt: skip
    assert config.attention_scale == 1 / 16
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_pattern_of_sliding_layers_may_be_a_number():
    hf = GEMMA_4B["text_config"] | {"sliding_window_pattern": 2, "num_hidden_layers": 5, "rope_local_base_freq": 500}
    config = ModelConfig.from_hf(hf)
    assert config.sliding_layers == (True, False, True, False, True)
    assert config.local_rope_theta == 500.0


def test_the_hubs_internlm3():
    hub = {
        "model_type": "internlm3", "vocab_size": 128512, "hidden_size": 4096, "intermediate_size": 10240,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "bias": False,
        "qkv_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 50000000,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"},
    }  # fmt: skip
    config = ModelConfig.from_hf(hub)
    assert config.rope_scaling == DynamicScaling(6.0, 32768) and config.rope_theta == 5e7
    assert not config.attention_bias and ModelConfig.from_hf(hub | {"qkv_bias": True}).attention_bias


def test_the_defaults_of_qwen3():
    hf = tiny_config(family="qwen3", num_heads=32, num_kv_heads=32).to_hf()
    del hf["head_dim"], hf["num_key_value_heads"]
    assert ModelConfig.from_hf(hf).head_dim == 128


ROPES = {
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'; supported: default, linear, dynamic, llama3"),
    "incomplete": ({"rope_type": "llama3", "factor": 4.0}, "low_freq_factor is None"),
    "partial": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
    "surplus": ({"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}, "has 'attention_factor'; supported:"),
    "text": ("linear", "rope_parameters is 'linear'; expected an object"),
}
BAD = {
    "llama": [
        (
            {"model_type": "mamba"},
            "model_type is 'mamba'; supported: llama, qwen2, qwen3, gemma3_text, internlm3, gemma3",
        ),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"mlp_bias": True}, "mlp_bias is True; supported: False"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; supported: null"),
        ({"hidden_size": None}, "hidden_size is None; expected a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of 4 heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "unlike rope_parameters"),
        *(({"rope_parameters": rope}, message) for rope, message in ROPES.values()),
    ],
    "qwen2": [
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({"is_causal": False}, "is_causal is False"),
    ],
    "internlm3": [({"bias": True}, "bias is True")],
    "gemma3": [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; supported: gelu_pytorch_tanh"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; supported: null"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; expected num_hidden_layers = 2"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types is 'chunked_attention'"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters is 'rope_type'; supported: full_attention"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type of sliding layers is 'linear'",
        ),
    ],
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [(family, *case) for family, cases in BAD.items() for case in cases],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_unsupported_field_is_named(family, changes, message):
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(tiny_config(**CONFIGS[family]).to_hf() | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"text_config": {"model_type": "gemma2"}}, "model_type is 'gemma2'; supported: gemma3_text"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is 30.0"),
    ],
    ids=["quantized", "gemma2", "capped"],
)
def test_unsupported_fields_around_a_text_model(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(GEMMA_4B | changes)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_leaf_has_names_of_its_own(changes):
    config = tiny_config(**changes)
    _, shapes = Model.build(config)
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    names = [name for path, _ in leaves for name in tensor_names(config, tuple(key.key for key in path))]
    assert len(set(names)) == len(names)
    assert [canonical_name(config, name) for name in names] == names
    layer = {name.removeprefix("model.layers.1.") for name in names if ".layers.1." in name}
    expected = 9 + 3 * config.attention_bias + 2 * config.qk_norm + 2 * config.is_gemma
    assert len(layer) == expected and len(names) == 2 * expected + (2 if config.tied_embeddings else 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", None),
        ("language_model.lm_head.weight", None),
        ("vision_tower.vision_model.post_layernorm.weight", None),
        ("model.vision_tower.vision_model.post_layernorm.weight", None),
        ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("model.surplus.weight", "model.surplus.weight"),
    ],
)
def test_names_in_a_checkpoint_with_a_vision_tower(name, expected):
    assert canonical_name(tiny_config(**GEMMA), name) == expected


def test_what_is_left_out_of_other_checkpoints():
    untied, tied = tiny_config(), tiny_config(tied_embeddings=True)
    assert (
        canonical_name(untied, "lm_head.weight") == "lm_head.weight" and canonical_name(tied, "lm_head.weight") is None
    )
    assert canonical_name(untied, "model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert canonical_name(untied, "vision_tower.weight") == "vision_tower.weight"


def test_norms_of_both_kinds_in_bfloat16():
    """Llama rounds before it multiplies, Gemma after, and Gemma's weight counts from 1."""
    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(rng.standard_normal((4, 16)[-n:]), jnp.bfloat16) for n in (2, 1))
    wide = np.asarray(x, np.float32)
    wide /= np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    found = {}
    for family in ("llama", "gemma3_text"):
        norm = RMSNorm(16, tiny_config(family=family), dtype=jnp.bfloat16)
        norm.scale[...] = scale
        found[family] = norm(x)
    np.testing.assert_array_equal(found["llama"], scale * jnp.asarray(wide).astype(jnp.bfloat16))
    np.testing.assert_array_equal(
        found["gemma3_text"], jnp.asarray(wide * (1 + np.asarray(scale, np.float32))).astype(jnp.bfloat16)
    )


def test_the_embedding_scale_is_rounded_as_the_weights_are():
    """√20 = 4.472 is 4.46875 in bfloat16."""
    model, params = toys.random_model(**(GEMMA | dict(hidden_size=20, num_layers=2)))
    table = params["embed"]["weight"][jnp.array([1, 2])]

    def embedded(params):
        return nnx.merge(model.graph, params)._embedded(jnp.array([[1, 2]]), None)[0]

    np.testing.assert_allclose(embedded(params), table * 20**0.5, rtol=1e-6)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    np.testing.assert_array_equal(embedded(rounded), table.astype(jnp.bfloat16) * jnp.bfloat16(4.46875))


def test_the_gates_of_both_kinds():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.float32)
    for family, gate in {
        "llama": lambda z: z / (1 + np.exp(-z)),
        "gemma3_text": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    }.items():
        mlp = GatedMLP(tiny_config(family=family), dtype=jnp.float32, rngs=nnx.Rngs(0))
        wide = [np.asarray(x, np.float64) @ np.asarray(part.kernel[...], np.float64) for part in (mlp.gate, mlp.up)]
        expected = (gate(wide[0]) * wide[1]) @ np.asarray(mlp.down.kernel[...], np.float64)
        np.testing.assert_allclose(mlp(x, None, None), expected, atol=1e-5)
