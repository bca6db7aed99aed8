"""Checkpoints out and in: the same bits come back, `transformers` can read them, and damage is named in one line."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toys
from safetensors.numpy import load_file, save_file

from unisd_jax.errors import UserError
from unisd_jax.models import hf_io, hf_tensors, iter_hf_tensors, load_hf, read_config, save_hf
from unisd_jax.models.config import Llama3Scaling
from unisd_jax.models.safetensors_io import Entry, TensorFile, new_tensor_file
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.testing import tiny_checkpoint

VARIANTS = {
    "untied": {},
    "tied": dict(tied_embeddings=True),
    "qwen2": dict(family="qwen2", attention_bias=True, tied_embeddings=True),
    "qwen3": dict(family="qwen3"),
    "internlm3": dict(family="internlm3", attention_bias=True),
    "gemma3": dict(
        family="gemma3_text", tied_embeddings=True, query_scalar=6.0, num_layers=3, sliding_window=3,
        sliding_layers=(True, True, False), local_rope_theta=100.0,
    ),
}  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert have.dtype == want.dtype
        assert np.asarray(have).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, variant, dtype):
    model, params = toys.random_model(**VARIANTS[variant])
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    save_hf(tmp_path / "model", model, params)
    loaded_model, loaded = load_hf(tmp_path / "model", dtype=dtype)
    assert loaded_model.config == model.config
    assert_same_bits(loaded, params)
    tied = model.config.tied_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model" / WEIGHTS)) == (not tied)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_from_eight_devices_is_loaded_onto_eight(tmp_path, variant):
    """With a vocabulary that they cannot share evenly, and as shards; without a mesh the padding is gone."""
    model, params = toys.random_model(**VARIANTS[variant], vocab_size=29)
    save_hf(tmp_path / "whole", model, params)
    mesh = build_mesh(1, 2, 4)
    sharded_model, sharded = load_hf(tmp_path / "whole", mesh=mesh)
    assert sharded["embed"]["weight"].shape == (32, 16) and not np.asarray(sharded["embed"]["weight"][29:]).any()
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(sharded))
    save_hf(tmp_path / "sharded", sharded_model, sharded, shard_bytes=3000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 3
    assert_same_bits(load_hf(tmp_path / "sharded", mesh=mesh)[1], sharded)
    assert_same_bits(load_hf(tmp_path / "sharded")[1], params)
    assert hf_tensors(sharded_model, sharded)["model.embed_tokens.weight"].shape == (29, 16)


def test_each_device_reads_its_own_part_only(checkpoint, monkeypatch):
    parts = []
    place = jax.make_array_from_callback

    def watched(shape, sharding, callback):
        return place(shape, sharding, lambda index: parts.append(np.shape(callback(index))) or callback(index))

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    load_hf(checkpoint, mesh=build_mesh(1, 2, 4))
    assert max(np.prod(part) for part in parts) == max(4 * 16, 24 * 16 // 8)


def test_the_loaded_model_is_the_same_key_of_the_jit_cache(tmp_path):
    model, params = toys.random_model()
    save_hf(tmp_path / "model", model, params)
    assert load_hf(tmp_path / "model")[0] == model


def test_dtype_on_disk_and_in_memory_may_differ(tmp_path):
    model, params = toys.random_model()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_hf(tmp_path / "model", model, half)
    _, wide = load_hf(tmp_path / "model", dtype=jnp.float32)
    assert_same_bits(wide, jax.tree.map(lambda x: x.astype(jnp.float32), half))
    assert load_file(tmp_path / "model" / WEIGHTS)["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_matrices_are_stored_the_way_torch_stores_them(tmp_path):
    """[out, in], one tensor per layer."""
    model, params = toys.random_model()
    save_hf(tmp_path / "model", model, params)
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    layers = params["layers"]
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.gate_proj.weight"], np.asarray(layers["mlp"]["gate"]["kernel"][1]).T
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.post_attention_layernorm.weight"], layers["mlp_norm"]["scale"][0]
    )
    assert tensors["lm_head.weight"].shape == (toys.VOCABULARY, 16)
    assert len(tensors) == 3 + 2 * 9


def test_several_weight_files_are_one_checkpoint(checkpoint):
    expected = load_hf(checkpoint)[1]
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, checkpoint / f"model-0000{number}-of-00002.safetensors")
    assert_same_bits(load_hf(checkpoint)[1], expected)


@pytest.fixture
def shards(checkpoint):
    """The checkpoint as three files and an index."""
    model, params = load_hf(checkpoint)
    save_hf(checkpoint, model, params, shard_bytes=9000)
    assert len(list(checkpoint.glob("*.safetensors"))) == 3
    return checkpoint


def test_shards_and_their_index(shards):
    """As transformers writes them: each tensor in one file, no file over the limit, no file without a tensor."""
    index = json.loads((shards / INDEX).read_text())
    held = {file.name: load_file(file) for file in shards.glob("*.safetensors")}
    assert sorted(held) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["weight_map"] == {tensor: name for name, tensors in held.items() for tensor in tensors}
    sizes = [sum(value.nbytes for value in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= 9000 and index["metadata"]["total_size"] == sum(sizes)
    assert_same_bits(load_hf(shards)[1], toys.random_model()[1])


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    save_hf(tmp_path / "model", *toys.random_model(), shard_bytes=1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3 + 2 * 9
    assert_same_bits(load_hf(tmp_path / "model")[1], toys.random_model()[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16], ids=lambda kind: kind.__name__)
def test_files_are_laid_out_as_the_library_reads_them(tmp_path, dtype):
    """Also where one type leaves the next at an odd place."""
    values = {"one": np.arange(3).astype(dtype), "two": np.ones((2, 5), np.float32), "none": np.zeros((0, 4), dtype)}
    entries = [Entry(name, value.shape, value.dtype) for name, value in values.items()]
    with new_tensor_file(tmp_path / "file", entries) as append:
        for value in values.values():
            append(value)
    theirs, ours = load_file(tmp_path / "file"), TensorFile(tmp_path / "file")
    assert set(ours.names) == set(theirs) == set(values)
    for name, value in values.items():
        assert theirs[name].dtype == ours.view(name).dtype == value.dtype
        assert theirs[name].tobytes() == ours.view(name).tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_half_precision_checkpoint(checkpoint, dtype):
    """float16 files, as some old checkpoints have them."""
    rewrite(checkpoint, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    _, params = toys.random_model()
    expected = jax.tree.map(lambda x: x.astype(jnp.float16).astype(dtype), params)
    assert_same_bits(load_hf(checkpoint, dtype=dtype)[1], expected)


def test_one_tensor_at_a_time_comes_to_the_host(tmp_path):
    """And where several processes gather it, those that write nothing gather the same in the same order."""
    model, params = toys.random_model()
    shapes = {True: [], False: []}
    for write in (True, False):

        def fetch(value, write=write):
            shapes[write].append(value.shape)
            return np.asarray(value)

        save_hf(tmp_path / str(write), model, params, fetch=fetch, write=write)
    assert shapes[True] == shapes[False] and len(shapes[True]) == 3 + 2 * 9
    assert max(map(len, shapes[True])) == 2, "no stacked leaf is fetched as a whole"
    assert os.listdir(tmp_path) == ["True"]
    assert [name for name, _ in iter_hf_tensors(model, params)] == list(hf_tensors(model, params))


WRAPPED = {"as the hub has it": "language_model.model.", "as transformers writes it": "model.language_model."}


@pytest.mark.parametrize("prefix", WRAPPED.values(), ids=WRAPPED)
def test_a_model_with_a_vision_tower_is_read_and_written_as_its_text_model(tmp_path, prefix):
    model, params = toys.random_model(**VARIANTS["gemma3"])
    save_hf(tmp_path / "text", model, params)
    tensors = load_file(tmp_path / "text" / WEIGHTS)
    tensors = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    tensors["vision_tower.patches.weight"] = np.ones((2, 2), np.float32)
    (tmp_path / "wrapped").mkdir()
    save_file(tensors, tmp_path / "wrapped" / WEIGHTS)
    text = json.loads((tmp_path / "text" / "config.json").read_text()) | {"pad_token_id": 0}
    wrapper = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 5]}
    (tmp_path / "wrapped" / "config.json").write_text(json.dumps(wrapper))

    loaded_model, loaded = load_hf(tmp_path / "wrapped")
    assert_same_bits(loaded, params)
    save_hf(tmp_path / "again", loaded_model, loaded, source=tmp_path / "wrapped")
    assert load_hf(tmp_path / "again")[0] == loaded_model
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == text | {"eos_token_id": [1, 5], "dtype": "float32"}


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path):
    model, params = toys.random_model(tied_embeddings=True)
    save_hf(tmp_path / "model", model, params)
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model" / WEIGHTS)
    assert_same_bits(load_hf(tmp_path / "model")[1], params)


def test_source_files_are_carried_over(tmp_path):
    """Template, tokenizer, generation settings and config fields that this program does not read."""
    source = tiny_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 258, "torch_dtype": "float16"}))
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    model, params = load_hf(source)
    target = tmp_path / "deep" / "export"
    save_hf(target, model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), source=source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    exported = json.loads((target / "config.json").read_text())
    assert exported == config | {"eos_token_id": 258, "dtype": "bfloat16"}
    assert load_hf(target)[0].config == model.config


def test_saving_replaces_the_directory_as_a_whole(checkpoint):
    (checkpoint / "model-00001-of-00002.safetensors").write_bytes(b"left by an earlier run")
    model, params = toys.random_model(seed=1)
    save_hf(checkpoint, model, params)
    assert_same_bits(load_hf(checkpoint)[1], params)
    assert sorted(file.name for file in checkpoint.iterdir()) == ["config.json", WEIGHTS]
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


@pytest.mark.parametrize("step", ["new_tensor_file", "write_json_atomic"])
def test_a_failed_save_leaves_the_old_checkpoint(checkpoint, monkeypatch, step):
    expected = load_hf(checkpoint)[1]

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf_io, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_hf(checkpoint, *toys.random_model(seed=1))
    assert_same_bits(load_hf(checkpoint)[1], expected)


def test_saving_onto_its_own_source(checkpoint):
    model, params = load_hf(checkpoint)
    save_hf(checkpoint, model, params, source=checkpoint)
    assert_same_bits(load_hf(checkpoint)[1], params)


ROPE = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)


@pytest.mark.parametrize(
    "changes",
    [dict(rope_scaling=ROPE, rope_theta=5e5), dict(family="qwen2", attention_bias=True, tied_embeddings=True)],
    ids=["llama31", "qwen2"],
)
def test_transformers_reads_the_export(tmp_path, changes):
    from transformers import AutoConfig, AutoTokenizer

    path = tiny_checkpoint(tmp_path / "model", **changes)
    ours, theirs = read_config(path), AutoConfig.from_pretrained(path)
    assert theirs.model_type == ours.family
    assert theirs.architectures == [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[ours.family]]
    pairs = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "intermediate_size": ours.intermediate_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "head_dim": ours.head_dim,
        "rms_norm_eps": ours.norm_eps,
        "tie_word_embeddings": ours.tied_embeddings,
        "max_position_embeddings": ours.max_position,
    }
    assert {name: getattr(theirs, name) for name in pairs} == pairs
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("default" if ours.rope_scaling is None else "llama3")
    # What transformers would write itself is read back to the same architecture.
    theirs.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == ours

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hé"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert max(ids) < ours.vocab_size


@pytest.fixture
def checkpoint(tmp_path):
    """A sound checkpoint to damage."""
    save_hf(tmp_path / "model", *toys.random_model())
    return tmp_path / "model"


def rewrite(checkpoint, change):
    """Applies `change` to the dict of tensors on disk."""
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def refused(path, **options):
    """The one line that a user reads."""
    with pytest.raises(UserError) as error:
        load_hf(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_directory_that_is_not_there(tmp_path):
    assert "model.path" in (message := refused(tmp_path / "nowhere")) and "not a directory" in message


def test_a_file_instead_of_a_directory(checkpoint):
    assert "not a directory" in refused(checkpoint / WEIGHTS)


def test_no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "no config.json" in refused(checkpoint)


@pytest.mark.parametrize("content", [b'{"model_type": ', b"\xff\xfe\x00", b"[1, 2]", b"null", b""])
def test_a_config_that_is_not_a_json_object(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    assert "config.json: not " in refused(checkpoint)


def test_an_unsupported_architecture(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "config.json: model_type is 'mamba'; supported: llama, qwen2" in refused(checkpoint)


def test_torch_pickles_only(checkpoint):
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    assert "no *.safetensors file (it has .bin files" in refused(checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / WEIGHTS).unlink()
    message = refused(checkpoint)
    assert message.endswith("no *.safetensors file")


def test_a_missing_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refused(checkpoint)


def test_a_surplus_tensor(checkpoint):
    """A checkpoint with biases that the architecture does not add must not load as if they were not there."""
    name = "model.layers.0.self_attn.o_proj.bias"
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.ones(16, np.float32)}))
    assert f"holds {name}, which llama has no place for" in refused(checkpoint)


def test_more_layers_than_the_config_says(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "holds model.layers.1." in refused(checkpoint)


def test_a_misshapen_tensor(checkpoint):
    def transpose(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.copy()

    rewrite(checkpoint, transpose)
    message = refused(checkpoint)
    # Shapes as they are on disk, [out, in].
    assert "tensor model.layers.0.mlp.up_proj.weight is (16, 24), config.json says (24, 16)" in message


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(checkpoint, kept):
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(data[:kept])
    assert f"{WEIGHTS}: not a readable safetensors file" in refused(checkpoint)


def test_a_missing_shard(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    message = refused(shards)
    assert f"model-00002-of-00003.safetensors, which {INDEX} names, is missing" in message


def test_an_index_that_is_wrong(shards):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (shards / INDEX).write_text(json.dumps(index))
    assert f"{INDEX} says that model.norm.weight is in model-00001-of-00003.safetensors" in refused(shards)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index(shards, content):
    (shards / INDEX).write_text(content)
    assert INDEX in refused(shards)


def test_an_index_that_points_elsewhere(shards):
    (shards / INDEX).write_text(json.dumps({"weight_map": {"a": "../model/model-00001-of-00003.safetensors"}}))
    assert "is missing" in refused(shards)


def test_a_truncated_shard(shards):
    shard = shards / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name}: not a readable safetensors file" in refused(shards)


def test_quantised_weights(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.int8)}))
    assert "tensor model.norm.weight is stored as I8; expected one of F32, F16, BF16" in refused(checkpoint)


def test_a_stacked_weight_that_is_not_finite(checkpoint):
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.full((16, 24), np.inf, np.float32)}))
    assert f"tensor {name} holds NaN or infinity" in refused(checkpoint)


def test_a_weight_too_large_for_bfloat16(checkpoint):
    names = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
    for name in names:
        original = load_file(checkpoint / WEIGHTS)[name]
        rewrite(checkpoint, lambda tensors, name=name: tensors.update({name: np.full_like(tensors[name], 3.4e38)}))
        load_hf(checkpoint)
        assert f"tensor {name} holds NaN or infinity" in refused(checkpoint, dtype=jnp.bfloat16)
        rewrite(checkpoint, lambda tensors, name=name, old=original: tensors.update({name: old}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_a_weight_that_is_not_finite(checkpoint, value, dtype):
    def spoil(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
        tensors["model.norm.weight"][3] = value

    rewrite(checkpoint, spoil)
    assert "tensor model.norm.weight holds NaN or infinity" in refused(checkpoint)
