"""How each family names its tensors in a Hugging Face checkpoint."""

from unisd_jax.models.config import ModelConfig

TOP_TENSORS = {
    ("embed", "weight"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "weight"): "lm_head.weight",
}
LAYER_MODULES = {
    ("attention_norm",): "input_layernorm",
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp_norm",): "post_attention_layernorm",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def tensor_names(config: ModelConfig, keys: tuple[str, ...]) -> list[str]:
    """The tensors that make up one of our leaves: one, or one per layer for stacked leaves."""
    if keys[0] != "layers":
        return [TOP_TENSORS[keys]]
    module, leaf = LAYER_MODULES[keys[1:-1]], LEAF_NAMES[keys[-1]]
    return [f"model.layers.{layer}.{module}.{leaf}" for layer in range(config.num_layers)]


def canonical_name(config: ModelConfig, name: str) -> str | None:
    """The name `tensor_names` uses for a tensor of a checkpoint; None for one that is no part of the text model."""
    return name
