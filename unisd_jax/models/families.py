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
    ("attention", "q_norm"): "self_attn.q_norm",
    ("attention", "k_norm"): "self_attn.k_norm",
    ("mlp_norm",): "post_attention_layernorm",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
# Where the other families normalise the MLP's input, Gemma normalises the attention's output.
GEMMA_MODULES = LAYER_MODULES | {
    ("attention_post_norm",): "post_attention_layernorm",
    ("mlp_norm",): "pre_feedforward_layernorm",
    ("mlp_post_norm",): "post_feedforward_layernorm",
}
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# A Gemma 3 with a vision tower, as its hub repository and as `transformers` 5 write it.
TEXT_PREFIXES = ("language_model.model.", "model.language_model.")
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def tensor_names(config: ModelConfig, keys: tuple[str, ...]) -> list[str]:
    """The tensors that make up one of our leaves: one, or one per layer for stacked leaves."""
    if keys[0] != "layers":
        return [TOP_TENSORS[keys]]
    modules = GEMMA_MODULES if config.is_gemma else LAYER_MODULES
    module, leaf = modules[keys[1:-1]], LEAF_NAMES[keys[-1]]
    return [f"model.layers.{layer}.{module}.{leaf}" for layer in range(config.num_layers)]


def canonical_name(config: ModelConfig, name: str) -> str | None:
    """The name `tensor_names` uses for a tensor of a checkpoint; None for one that is no part of the text model.

    That is the vision tower, the head of a model whose head is its embedding, and the rotary frequencies that old
    checkpoints hold beside the config they follow from.
    """
    if config.is_gemma:
        if name.startswith(VISION_PREFIXES):
            return None
        for prefix in TEXT_PREFIXES:
            if name.startswith(prefix):
                name = f"model.{name.removeprefix(prefix)}"
        name = "lm_head.weight" if name == "language_model.lm_head.weight" else name
    if name.endswith(".rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight"):
        return None
    return name
