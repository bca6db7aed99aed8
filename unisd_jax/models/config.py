"""What a decoder looks like, read from a Hugging Face `config.json`."""

import dataclasses
from typing import Any

from unisd_jax.errors import UserError
from unisd_jax.models.hf_fields import boolean, integer, mapping, number, refuse
from unisd_jax.models.rope import DynamicScaling as DynamicScaling
from unisd_jax.models.rope import LinearScaling as LinearScaling
from unisd_jax.models.rope import Llama3Scaling as Llama3Scaling
from unisd_jax.models.rope import Scaling, read_scaling, rope_fields

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}
# What `transformers` takes where config.json says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True, "rope_theta": 1e6,
    },
    "internlm3": {"max_position_embeddings": 32768},
}  # fmt: skip
# Fields that would change what is computed → the values under which they do not.
INERT = {
    "mlp_bias": (False,),
    "bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_causal": (True,),
    "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of one of the families. Hashable, so it can be a static argument of jit.

    `sliding_layers` says of each layer whether it sees only the last `sliding_window` tokens (the token itself among
    them) and turns with `local_rope_theta`, unscaled; it is empty where all layers see everything.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Scaling | None
    attention_bias: bool
    tied_embeddings: bool
    max_position: int
    query_scalar: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None

    @property
    def is_gemma(self) -> bool:
        """Four norms per layer that multiply by 1 + w, scaled embeddings, a tanh GELU."""
        return self.family == "gemma3_text"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised, each head by itself."""
        return self.family in ("qwen3", "gemma3_text")

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Reads a parsed `config.json`; of a Gemma 3 with a vision tower, the text model.

        Raises:
          UserError: the family or one of its fields is not supported; the message names the field.
        """
        hf = _text_model(hf)
        family = hf["model_type"]
        hf = DEFAULTS[family] | hf
        _refuse_what_changes_numbers(hf, family)
        heads, hidden = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
        kv_heads = integer(hf, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(f"config.json: num_key_value_heads is {kv_heads}; expected a divisor of {heads} heads")
        head_dim = integer(hf, "head_dim", hidden // heads)
        if head_dim % 2:
            raise UserError(f"config.json: head_dim is {head_dim}; expected an even number")
        max_position = integer(hf, "max_position_embeddings", 2048)
        rope, local_rope = _rope_entries(hf, family)
        fields = cls(
            family=family,
            vocab_size=integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(hf, "intermediate_size"),
            num_layers=integer(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=number(hf, "rms_norm_eps", 1e-6),
            rope_theta=number(rope if "rope_theta" in rope else hf, "rope_theta", 10_000.0),
            rope_scaling=read_scaling(rope, max_position),
            attention_bias=family == "qwen2" or (family == "internlm3" and boolean(hf, "qkv_bias", False)),
            tied_embeddings=boolean(hf, "tie_word_embeddings", False),
            max_position=max_position,
        )
        return dataclasses.replace(fields, **_gemma_fields(hf, local_rope)) if fields.is_gemma else fields

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back to this value."""
        fields = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": rope_fields(self.rope_theta, self.rope_scaling),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_embeddings,
            "max_position_embeddings": self.max_position,
        }
        if self.family == "internlm3":
            fields |= {"bias": False, "qkv_bias": self.attention_bias}
        if not self.is_gemma:
            return fields
        del fields["hidden_act"]
        local_theta = self.local_rope_theta or self.rope_theta
        return fields | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": self.query_scalar,
            "sliding_window": self.sliding_window or self.max_position,
            "layer_types": [LAYER_TYPES[slides] for slides in self.sliding_layers or (False,) * self.num_layers],
            "rope_local_base_freq": local_theta,
            "rope_parameters": {
                "full_attention": fields["rope_parameters"],
                "sliding_attention": rope_fields(local_theta, None),
            },
        }


def _text_model(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model, with a supported `model_type`."""
    family = hf.get("model_type")
    if family == "gemma3":
        refuse(hf, "quantization_config", (None,))
        tied = {"tie_word_embeddings": boolean(hf, "tie_word_embeddings", True)}
        text = {"model_type": "gemma3_text"} | tied | mapping(hf, "text_config")
        refuse(text, "model_type", ("gemma3_text",))
        return text
    if family not in ARCHITECTURES:
        raise UserError(f"config.json: model_type is {family!r}; supported: {', '.join([*ARCHITECTURES, 'gemma3'])}")
    return hf


def _refuse_what_changes_numbers(hf: dict[str, Any], family: str) -> None:
    for field, supported in INERT.items():
        refuse(hf, field, supported)
    if family == "gemma3_text":
        refuse(hf, "hidden_activation", ("gelu_pytorch_tanh",))
    else:
        refuse(hf, "hidden_act", ("silu",))
        for kind in hf.get("layer_types") or ():
            refuse({"layer_types": kind}, "layer_types", ("full_attention",))
    # In qwen2 the biases are there whatever this field says; elsewhere it would put one on the output projection too.
    if family != "qwen2":
        refuse(hf, "attention_bias", (False,))


def _rope_entries(hf: dict[str, Any], family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary fields of full layers and of sliding ones."""
    parameters, scaling = mapping(hf, "rope_parameters"), mapping(hf, "rope_scaling")
    local: dict[str, Any] = {}
    if family == "gemma3_text" and parameters:
        for field in parameters:
            refuse({"rope_parameters": field}, "rope_parameters", LAYER_TYPES)
        local, parameters = mapping(parameters, "sliding_attention"), mapping(parameters, "full_attention")
    if parameters and not scaling.items() <= parameters.items():
        raise UserError(f"config.json: rope_scaling is {scaling}, unlike rope_parameters; expected one of them")
    return parameters or scaling, local


def _gemma_fields(hf: dict[str, Any], local_rope: dict[str, Any]) -> dict[str, Any]:
    layers = integer(hf, "num_hidden_layers")
    pattern = integer(hf, "sliding_window_pattern", 6)
    kinds = hf.get("layer_types") or [LAYER_TYPES[(layer + 1) % pattern > 0] for layer in range(layers)]
    for kind in kinds:
        refuse({"layer_types": kind}, "layer_types", LAYER_TYPES)
    if len(kinds) != layers:
        raise UserError(f"config.json: layer_types has {len(kinds)} entries; expected num_hidden_layers = {layers}")
    fields: dict[str, Any] = {"query_scalar": number(hf, "query_pre_attn_scalar")}
    if "sliding_attention" not in kinds:
        return fields
    if read_scaling(local_rope, 1) is not None:
        raise UserError(f"config.json: rope_type of sliding layers is {local_rope['rope_type']!r}; supported: default")
    named = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)} | local_rope
    return fields | {
        "sliding_window": integer(hf, "sliding_window"),
        "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds),
        "local_rope_theta": number(named, "rope_theta"),
    }
