"""Small stand-ins for trying a recipe in seconds: a tiny chat model, a byte tokenizer, a sampler with a script."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from unisd_jax.models import Model, ModelConfig, save_hf
from unisd_jax.testing.sampler import FakeSampler as FakeSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURN_START, TURN_END, PADDING = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(**changes) -> ModelConfig:
    """Two layers, 32 wide, untied; any field can be changed."""
    fields = dict(
        family="llama", vocab_size=264, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, norm_eps=1e-5, rope_theta=10_000.0, rope_scaling=None, attention_bias=False, tied_embeddings=False,
        max_position=512,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def tiny_model(seed: int = 0, **changes) -> tuple[Model, dict]:
    """A random model of `tiny_config` and its float32 parameters."""
    model, _ = Model.build(tiny_config(**changes))
    return model, model.init(seed)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per byte and three special ones, with a ChatML template; needs no files."""
    # transformers announces at import that torch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (PADDING, TURN_START, TURN_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PADDING, chat_template=CHAT_TEMPLATE
    )


def tiny_checkpoint(path: str | Path, seed: int = 0, **changes) -> Path:
    """Writes a checkpoint directory of `tiny_model` with the byte tokenizer; returns its path."""
    model, params = tiny_model(seed, **changes)
    save_hf(path, model, jax.device_get(params))
    byte_tokenizer().save_pretrained(path)
    return Path(path)
