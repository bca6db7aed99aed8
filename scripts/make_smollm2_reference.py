"""Compute reference numbers for the converted SmolLM2 checkpoint with transformers and torch, in float32.

Run by hand, in a separate environment with torch and transformers (torch is no dependency of this project), after
`scripts/prepare_smollm2.py`; the tests compare the JAX model with the file it leaves:

    python scripts/make_smollm2_reference.py [--model FOLDER] [--out tests/parity/smollm2_reference.npz]

Arrays, for B = 3 chat prompts padded on the left to P tokens, the last L = 6 positions and G = 24 greedy tokens:
  input_ids, attention_mask  [B, P] int32
  top_ids [B, L, 8] int32, top_logits [B, L, 8] float32   the eight largest logits, largest first
  log_sum_exp                [B, L] float32   of all logits
  hidden_norm                [B, L] float32   Euclidean norm of the last hidden state, after the final RMS norm
  greedy_ids                 [B, G] int32     after the end-of-turn token: the padding token, which is the same id
  greedy_margin              [B, G] float32   largest minus second largest logit; infinity after the end of turn
"""

import argparse
import io
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "What is the capital of France?",
    "Anna has 3 red apples and 12 green ones.  Write a short story about what she does with them on a rainy day.",
    'What is the opposite of "hot"? Reply only with JSON: {"answer": "___"}',
)
POSITIONS, TOP, NEW_TOKENS = 6, 8, 24


def tokenize(path: Path) -> dict:
    """The chat prompts as one batch, padded on the left; padding is told from text by the mask, not by the id."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True) for chat in chats]
    ids = [row["input_ids"] for row in rows]
    return tokenizer.pad({"input_ids": ids}, padding=True, padding_side="left", return_tensors="pt")


def reference(model, batch: dict) -> dict[str, np.ndarray]:
    """All arrays named in the module's docstring, from tensors of prompts."""
    import torch

    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    hidden = model.model(**batch, position_ids=position_ids).last_hidden_state[:, -POSITIONS:]
    logits = model.lm_head(hidden)
    top = logits.topk(TOP, dim=-1)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**batch, **options)
    greedy = output.sequences[:, batch["input_ids"].shape[1] :]
    best = torch.stack(output.logits, dim=1).topk(2, dim=-1).values
    ended = (greedy == model.generation_config.eos_token_id).int().cumsum(-1) > 1
    margin = (best[..., 0] - best[..., 1]).masked_fill(ended, torch.inf)
    arrays = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "top_ids": top.indices,
        "top_logits": top.values,
        "log_sum_exp": logits.logsumexp(-1),
        "hidden_norm": hidden.norm(dim=-1),
        "greedy_ids": greedy,
        "greedy_margin": margin,
    }
    return {
        name: array.numpy().astype(np.float32 if array.is_floating_point() else np.int32)
        for name, array in arrays.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--out", type=Path, default=Path("tests/parity/smollm2_reference.npz"))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval().requires_grad_(False)
    arrays = reference(model, dict(tokenize(options.model)))
    if arrays["greedy_ids"].shape[1] != NEW_TOKENS:
        raise SystemExit(f"every prompt ended before {NEW_TOKENS} tokens; choose a prompt with a longer reply")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(buffer.getvalue())
    print(f"{options.out}: {len(buffer.getvalue())} bytes, smallest greedy margin {arrays['greedy_margin'].min():.4f}")


if __name__ == "__main__":
    main()
