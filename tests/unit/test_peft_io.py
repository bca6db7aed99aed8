"""Adapters in PEFT's files: what peft wrote means the same here, what is written comes back, the rest is refused.

`data/peft` holds a small Llama, two adapters of it whose random factors `peft` saved, and what torch computed with
them (versions in `expected.json`): once with the adapter beside the weights, once after `merge_and_unload`.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from safetensors.numpy import load_file, save_file

from unisd_jax.errors import UserError
from unisd_jax.models import hf_tensors, load_hf, load_peft, merge, save_peft
from unisd_jax.models.lora import TARGETS
from unisd_jax.teacher.ema import ema_update, start_ema

DATA = Path(__file__).parent / "data" / "peft"
EXPECTED = json.loads((DATA / "expected.json").read_text())
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    return load_hf(DATA / "base")


def logits(model, params, lora=None):
    ids = jnp.asarray(EXPECTED["ids"])
    return np.asarray(model.logits(params, model.hidden(params, ids, jnp.ones(ids.shape, bool), lora=lora)))[0]


def assert_same_factors(found, expected):
    assert found.scale == expected.scale and set(found.factors) == set(expected.factors)
    for path, factors in expected.factors.items():
        for have, want in zip(found.factors[path], factors, strict=True):
            np.testing.assert_array_equal(have, want)


# --- peft's own numbers ---


def test_the_base_alone(base):
    np.testing.assert_allclose(logits(*base), EXPECTED["base"], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scale", "rank", "targets"),
    [("plain", 5 / 2, 2, ("q", "v", "o", "down")), ("rslora", 4 / 3**0.5, 3, tuple(TARGETS))],
)
def test_an_adapter_that_peft_saved(base, kind, scale, rank, targets):
    model, params = base
    lora = load_peft(DATA / kind, model, params)
    assert lora.scale == scale and set(lora.factors) == {TARGETS[name] for name in targets}
    assert {factors.a.shape[-1] for factors in lora.factors.values()} == {rank}
    expected = EXPECTED["adapters"][kind]
    assert np.abs(np.subtract(expected["logits"], EXPECTED["base"])).max() > 1
    np.testing.assert_allclose(logits(model, params, lora), expected["logits"], atol=1e-4)
    # And as peft's merge_and_unload leaves the weights.
    merged = merge(params, lora)
    weight = hf_tensors(model, merged)["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_allclose(weight, expected["merged_q_proj_of_layer_1"], atol=1e-6)
    np.testing.assert_allclose(logits(model, merged), expected["merged_logits"], atol=1e-4)


def test_peft_s_file_is_written_back_byte_for_byte(base, tmp_path):
    model, params = base
    save_peft(tmp_path / "adapter", model, load_peft(DATA / "plain", model, params), base="base")
    ours, theirs = load_file(tmp_path / "adapter" / WEIGHTS), load_file(DATA / "plain" / WEIGHTS)
    assert set(ours) == set(theirs)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    written, read = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "adapter", DATA / "plain"))
    fields = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "bias", "use_rslora")
    assert {name: written[name] for name in fields} == {name: read[name] for name in fields}
    assert sorted(written["target_modules"]) == sorted(read["target_modules"])


# --- Out and in ---


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, family):
    model, params = toys.random_model(family=family, attention_bias=family == "qwen2")
    lora = toys.random_lora(params, rank=3, targets=tuple(TARGETS), scale=2.5)
    save_peft(tmp_path / "adapter", model, lora, base="org/name")
    assert_same_factors(load_peft(tmp_path / "adapter", model, params), lora)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 7.5, "org/name")


def test_factors_lie_as_peft_keeps_them(tmp_path):
    model, params = toys.random_model()
    lora = toys.random_lora(params, rank=3, targets=("down",))
    save_peft(tmp_path, model, lora, base="")
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = lora.factors["mlp/down"]
    names = [f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight" for side in "AB"]
    np.testing.assert_array_equal(tensors[names[0]], np.asarray(a[1]).T)
    np.testing.assert_array_equal(tensors[names[1]], np.asarray(b[1]).T)
    assert len(tensors) == 4


def test_the_ema_of_an_adapter_has_twice_its_rank(tmp_path):
    """Except where a matrix can hold no more, as k with its 8 columns: there zeros fill it up."""
    model, params = toys.random_model()
    first, second = (toys.random_lora(params, seed, rank=5, targets=("q", "k")) for seed in (0, 1))
    average = ema_update(start_ema(first), second, decay=0.6)
    assert {path: factors.a.shape[-1] for path, factors in average.factors.items()} == {
        "attention/q": 10,
        "attention/k": 8,
    }
    save_peft(tmp_path, model, average, base="")
    found = load_peft(tmp_path, model, params)
    assert found.scale == average.scale
    assert {factors.a.shape[-1] for factors in found.factors.values()} == {10}
    expected = toys.products(average)
    for path, product in toys.products(found).items():
        np.testing.assert_allclose(product, expected[path], atol=1e-12)


def test_saving_replaces_the_directory(tmp_path):
    model, params = toys.random_model()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "left.txt").write_text("by an earlier run")
    lora = toys.random_lora(params)
    save_peft(tmp_path / "adapter", model, lora, base="")
    assert_same_factors(load_peft(tmp_path / "adapter", model, params), lora)
    assert not (tmp_path / "adapter" / "left.txt").exists()


def test_half_precision_factors(base, tmp_path):
    model, params = base
    adapter = shutil.copytree(DATA / "plain", tmp_path / "plain")
    rewrite(adapter, lambda tensors: tensors.update({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}))
    lora = load_peft(adapter, model, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {np.dtype(np.float32)}
    exact = load_peft(DATA / "plain", model, params)
    for have, want in zip(jax.tree.leaves(lora), jax.tree.leaves(exact), strict=True):
        np.testing.assert_array_equal(have, want.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_wrapped_model(tmp_path, prefix):
    """Gemma 3 with a vision tower calls the same matrices by longer names."""
    model, params = toys.random_model(family="gemma3_text", tied_embeddings=True)
    lora = toys.random_lora(params)
    save_peft(tmp_path, model, lora, base="")
    tensors = load_file(tmp_path / WEIGHTS)
    wrapped = {name.replace("base_model.model.model.", f"base_model.model.{prefix}"): x for name, x in tensors.items()}
    assert not set(wrapped) & set(tensors)
    save_file(wrapped, tmp_path / WEIGHTS)
    assert_same_factors(load_peft(tmp_path, model, params), lora)


# --- What is refused ---


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter to damage."""
    return shutil.copytree(DATA / "plain", tmp_path / "plain")


def rewrite(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def edit(adapter, **changes):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))


def refused(base, adapter):
    """The one line that a user reads."""
    with pytest.raises(UserError) as error:
        load_peft(adapter, *base)
    message = str(error.value)
    assert str(adapter) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("trainable_token_indices", [1, 2]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("a_field_of_the_future", "on"),
    ],
)
def test_a_config_that_means_something_else(base, adapter, field, value):
    edit(adapter, **{field: value})
    assert field in refused(base, adapter)


@pytest.mark.parametrize("value", ["all-linear", ["model.layers.0.mlp.down_proj"], None])
def test_forms_of_target_modules(base, adapter, value):
    """The tensors say what is adapted."""
    edit(adapter, target_modules=value)
    assert len(load_peft(adapter, *base).factors) == 4


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def test_a_missing_tensor(base, adapter):
    rewrite(adapter, lambda tensors: tensors.pop(QUERY))
    assert f"tensor {QUERY} is missing" in refused(base, adapter)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        QUERY.replace("lora_A", "lora_magnitude_vector"),
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_surplus_tensor(base, adapter, name):
    rewrite(adapter, lambda tensors: tensors.update({name: np.ones((2, 16), np.float32)}))
    assert f"holds {name}" in refused(base, adapter)


def test_a_misshapen_tensor(base, adapter):
    rewrite(adapter, lambda tensors: tensors.update({QUERY: np.ones((2, 15), np.float32)}))
    assert f"tensor {QUERY} is (2, 15); expected (2, 16)" in refused(base, adapter)


def test_another_rank_than_the_config_says(base, adapter):
    edit(adapter, r=4)
    assert "expected (4, 16)" in refused(base, adapter)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_factor_that_is_not_finite(base, adapter, value):
    rewrite(adapter, lambda tensors: tensors.update({QUERY: np.full((2, 16), value, np.float32)}))
    assert f"tensor {QUERY} holds NaN or infinity" in refused(base, adapter)


def test_no_tensors(base, adapter):
    rewrite(adapter, lambda tensors: tensors.clear())
    assert "holds no adapted matrix" in refused(base, adapter)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_that_is_not_an_object(base, adapter, content):
    (adapter / CONFIG).write_text(content)
    assert "adapter_config.json: not " in refused(base, adapter)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_not_an_adapter(base, adapter, name):
    (adapter / name).unlink()
    assert "not an adapter of peft's" in refused(base, adapter)
