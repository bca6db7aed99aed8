"""What a decoder looks like, read from a Hugging Face `config.json`."""

import dataclasses
from typing import Any

from unisd_jax.errors import UserError

FAMILIES = ("llama", "qwen2")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the low rotary frequencies; lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder in the Llama layout. Hashable, so it can be a static argument of jit."""

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
    rope_scaling: Llama3Scaling | None
    attention_bias: bool
    tied_embeddings: bool
    max_position: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Reads a parsed `config.json`.

        Raises:
          UserError: the family or one of its fields is not supported; the message names the field.
        """
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"config.json: model_type is {family!r}; supported: {', '.join(FAMILIES)}")
        _refuse(hf, "hidden_act", ("silu",))
        _refuse(hf, "mlp_bias", (False,))
        _refuse(hf, "use_sliding_window", (False,))
        if family == "llama":
            _refuse(hf, "attention_bias", (False,))
        heads = _integer(hf, "num_attention_heads")
        hidden = _integer(hf, "hidden_size")
        kv_heads = _integer(hf, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(f"config.json: num_key_value_heads is {kv_heads}; expected a divisor of {heads} heads")
        head_dim = _integer(hf, "head_dim", hidden // heads)
        if head_dim % 2:
            raise UserError(f"config.json: head_dim is {head_dim}; expected an even number")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        return cls(
            family=family,
            vocab_size=_integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(hf, "intermediate_size"),
            num_layers=_integer(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=_number(hf, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope if "rope_theta" in rope else hf, "rope_theta", 10_000.0),
            rope_scaling=_rope_scaling(rope),
            attention_bias=family == "qwen2",
            tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position=_integer(hf, "max_position_embeddings", 2048),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back to this value."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_position,
            }
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.family]],
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
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied_embeddings,
            "max_position_embeddings": self.max_position,
        }


def _integer(hf: dict[str, Any], field: str, default: int | None = None) -> int:
    value = hf.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {field} is {value!r}; expected a positive integer")
    return value


def _number(hf: dict[str, Any], field: str, default: float | None = None) -> float:
    value = hf.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json: {field} is {value!r}; expected a positive number")
    return float(value)


def _refuse(hf: dict[str, Any], field: str, supported: tuple) -> None:
    if hf.get(field, supported[0]) not in supported:
        raise UserError(f"config.json: {field} is {hf[field]!r}; supported: {supported}")


def _rope_scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"config.json: rope_type is {kind!r}; supported: default, llama3")
    return Llama3Scaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position=_integer(rope, "original_max_position_embeddings"),
    )
