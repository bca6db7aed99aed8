"""The probe sees every way in which a server's weights can be wrong, and the diagnosis names the part that is."""

import copy
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from safetensors.numpy import load_file, save_file

from unisd_jax.errors import UserError
from unisd_jax.models import Lora, load_hf, save_hf
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.rollout import diagnosis
from unisd_jax.rollout.diagnosis import UNKNOWN, explain
from unisd_jax.rollout.probe import _logps, bound, make_probe, probe_gap, probe_logps
from unisd_jax.rollout.weights import Publisher

MODELS = {
    "llama": dict(num_layers=3),
    "tied qwen3": dict(num_layers=3, family="qwen3", tied_embeddings=True),
}
TOLERANCE = bound(None, "float32")
TIED_LLAMA = dict(num_layers=3, tied_embeddings=True)
KEPT = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")


def random_probe(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(3, 14)), int(rng.integers(2, 9))) for _ in range(rows)]
    sequences = [tuple(rng.integers(1, toys.VOCABULARY, length).tolist() for length in pair) for pair in lengths]
    return make_probe(sequences, pad_id=0, prompt_length=10, completion_length=6, rows=rows)


PROBE = random_probe()


def updated(params, seed=5, size=0.05):
    """The weights after some training: every tensor has moved."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + size * jnp.asarray(rng.standard_normal(x.shape, np.float32)), params)


class Case:
    """A model at two versions, both published, and a server to spoil."""

    def __init__(self, folder, changes):
        self.model, self.old = toys.random_model(**changes)
        self.new = updated(self.old)
        self.sync = Publisher(folder, self.model, owner="run", dtype="float32", base="base")
        self.previous = self.sync.write(self.old, 4)
        self.published = self.sync.write(self.new, 5)
        self.tied = self.model.config.tied_embeddings
        self.expected = np.asarray(probe_logps(self.model, self.new, PROBE))

    def server(self, params, head=None):
        return np.asarray(probe_logps(self.model, params, PROBE, head=head))

    def gap(self, found):
        return probe_gap(found, self.expected, PROBE.completions.mask)

    def sentence(self, found, **changes):
        arguments = dict(published=self.published, previous=self.previous, tolerance=TOLERANCE) | changes
        return explain(self.model, self.new, None, PROBE, found, **arguments)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("sync"), MODELS[request.param])


@pytest.fixture(scope="module")
def one_case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("sync"), TIED_LLAMA)


@pytest.fixture
def published(one_case, tmp_path):
    """A copy of the version, with its tensors, to spoil."""
    shutil.copytree(one_case.published.folder, tmp_path / "v00000005")
    copied = one_case.published._replace(folder=tmp_path / "v00000005")
    return copied, load_file(copied.folder / "model.safetensors")


# --- the probe ---


def test_a_probe_is_the_end_of_the_prompts_and_the_beginning_of_the_completions():
    sequences = [([1, 2, 3, 4], [5, 6, 7]), ([], [1]), ([8], []), ([9], [3]), ([1], [2])]
    probe = make_probe(sequences, pad_id=30, prompt_length=3, completion_length=2, rows=2)
    assert probe.rows() == [([2, 3, 4], [5, 6]), ([9], [3])]
    assert probe.prompts.ids.tolist() == [[2, 3, 4], [30, 30, 9]]
    assert probe.prompts.mask.tolist() == [[True] * 3, [False, False, True]]
    assert probe.completions.ids.tolist() == [[5, 6], [3, 30]]
    assert probe.completions.mask.tolist() == [[True, True], [True, False]]


def test_a_probe_needs_one_sequence_of_both_parts():
    with pytest.raises(UserError, match="expected one for the probe"):
        make_probe([([], [1]), ([2], [])], pad_id=0)


def test_log_probs_are_those_of_each_row_alone():
    """Against the whole softmax of an unpadded sequence."""
    model, params = toys.random_model(num_layers=3)
    found = np.asarray(probe_logps(model, params, PROBE))
    for row, (prompt, completion) in enumerate(PROBE.rows()[:2]):
        ids = jnp.asarray([prompt + completion])
        logits = model.logits(params, model.hidden(params, ids, jnp.ones(ids.shape, bool)))
        logps = jax.nn.log_softmax(logits)[0, len(prompt) - 1 : -1]
        expected = logps[np.arange(len(completion)), np.array(completion)]
        np.testing.assert_allclose(found[row, : len(completion)], expected, atol=1e-5)
        assert not found[row, len(completion) :].any()


def test_a_gap_counts_what_is_in_the_mask():
    found, expected = np.array([[1.0, 5.0], [2.0, 0.0]]), np.array([[1.5, 0.0], [2.0, 0.0]])
    mask = np.array([[True, False], [True, True]])
    assert probe_gap(found, expected, mask) == pytest.approx((0.5 / 3, 0.5))


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_number_is_infinitely_far(value, side):
    pair = [np.zeros((1, 2)), np.zeros((1, 2))]
    pair[side][0, 1] = value
    assert probe_gap(*pair, np.ones((1, 2), bool)) == (np.inf, np.inf)
    assert probe_gap(*pair, np.array([[True, False]])) == (0, 0)
    both = np.full((1, 2), value)
    assert probe_gap(both, both, np.ones((1, 2), bool)) == (np.inf, np.inf)


def test_the_bound_is_the_option_or_follows_the_type():
    assert (bound(None, "float32"), bound(None, "bfloat16"), bound(0.1, "bfloat16")) == (0.002, 1.0, 0.1)


# --- a server that is right ---


def test_a_server_that_has_loaded_the_files_is_not_suspected(case, tmp_path):
    shutil.copytree(case.published.folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(case.model.config.to_hf()))
    model, params = load_hf(tmp_path / "model")
    head = jnp.asarray(load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"])
    assert case.gap(np.asarray(probe_logps(model, params, PROBE, head=head))).largest < 1e-5


def test_a_merged_adapter_is_not_suspected(tmp_path):
    """The trainer keeps it beside the weights."""
    model, params = toys.random_model(num_layers=3)
    lora = toys.random_lora(params, size=0.1, targets=("q", "down", "up"))
    published = Publisher(tmp_path, model, owner="run", dtype="float32", base="base").write(params, 1, lora=lora)
    (published.folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    found = np.asarray(probe_logps(model, load_hf(published.folder)[1], PROBE))
    mask = PROBE.completions.mask
    assert probe_gap(found, np.asarray(probe_logps(model, params, PROBE, lora=lora)), mask).largest < 1e-4
    assert probe_gap(found, np.asarray(probe_logps(model, params, PROBE)), mask).largest > TOLERANCE
    arguments = dict(published=published, previous=None, tolerance=TOLERANCE)
    without = np.asarray(probe_logps(model, params, PROBE))
    assert explain(model, params, lora, PROBE, without, **arguments) == UNKNOWN


def test_a_server_in_bfloat16_is_within_its_bound(case):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.new)
    assert case.gap(case.server(half)).largest < bound(None, "bfloat16")


# --- a server that is wrong ---


def with_leaf(tree, path, change):
    """A copy of a tree in which one leaf is `change(leaf)`."""
    tree = copy.copy(tree)
    key, _, rest = path.partition("/")
    tree[key] = with_leaf(tree[key], rest, change) if rest else change(tree[key])
    return tree


def in_layer(layer, value):
    return lambda leaf: leaf.at[layer].set(value(leaf) if callable(value) else value[layer])


def layer_of(new, old, layer):
    return new | {"layers": jax.tree.map(lambda n, o: n.at[layer].set(o[layer]), new["layers"], old["layers"])}


Q, OUT, GATE = (f"layers/{path}/kernel" for path in ("attention/q", "attention/o", "mlp/gate"))
STALE = {
    "still has version 4's weights, all of them": lambda new, old: old,
    "still has version 4's final norm": lambda new, old: new | {"norm": old["norm"]},
    "still has version 4's layers, all of them": lambda new, old: new | {"layers": old["layers"]},
    "still has version 4's layer 2": lambda new, old: layer_of(new, old, 2),
    "still has version 4's mlp/gate in all layers": lambda new, old: with_leaf(
        new, GATE, lambda _: old["layers"]["mlp"]["gate"]["kernel"]
    ),
    "still has version 4's mlp_norm in all layers": lambda new, old: with_leaf(
        new, "layers/mlp_norm/scale", lambda _: old["layers"]["mlp_norm"]["scale"]
    ),
    "still has version 4's model.layers.1.self_attn.q_proj.weight": lambda new, old: with_leaf(
        new, Q, in_layer(1, old["layers"]["attention"]["q"]["kernel"])
    ),
    "still has version 4's model.layers.0.input_layernorm.weight": lambda new, old: with_leaf(
        new, "layers/attention_norm/scale", in_layer(0, old["layers"]["attention_norm"]["scale"])
    ),
}
MIXED = {
    "has layers 1 and 2 exchanged": lambda new: (
        new | {"layers": jax.tree.map(lambda x: x[np.array([0, 2, 1])], new["layers"])}
    ),
    "has attention/q transposed in all layers": lambda new: with_leaf(new, Q, lambda x: x.swapaxes(1, 2)),
    "has model.layers.1.self_attn.o_proj.weight transposed": lambda new: with_leaf(
        new, OUT, in_layer(1, lambda x: x[1].T)
    ),
}


@pytest.mark.parametrize("text", STALE)
def test_what_was_left_behind_is_named(case, text):
    params = STALE[text](case.new, case.old)
    head = None
    if "all of them" in text and "weights" not in text:
        head = case.model.head(case.new)
    found = case.server(params, head)
    assert case.gap(found).largest > TOLERANCE
    programs = _logps._cache_size()
    assert case.sentence(found) == f"its files are right, the server {text}"
    assert _logps._cache_size() <= programs + 2, "one program for the whole probe, one for a row, whatever is guessed"


@pytest.mark.parametrize("text", MIXED)
def test_what_was_mixed_up_is_named_also_without_an_earlier_version(case, text):
    found = case.server(MIXED[text](case.new))
    assert case.gap(found).largest > TOLERANCE
    for previous in (case.previous, None):
        assert case.sentence(found, previous=previous) == f"its files are right, the server {text}"


def test_a_head_or_an_embedding_that_was_left_behind_is_named(case):
    """Also where they are the same tensor: the server keeps a copy of the head."""
    old_head, new_head = case.model.head(case.old), case.model.head(case.new)
    old_embedding = case.new | {"embed": case.old["embed"]}
    for found, part in [
        (case.server(case.new, old_head), "output head"),
        (case.server(old_embedding, new_head), "embedding"),
    ]:
        assert case.gap(found).largest > TOLERANCE
        assert case.sentence(found) == f"its files are right, the server still has version 4's {part}"


def test_every_single_tensor_is_seen(case):
    """The one that moves a log-prob least is far above the bound, and above what rounding makes of right weights."""
    seen = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(case.old):
        names = "/".join(key.key for key in path)
        for layer in range(len(leaf)) if names.startswith("layers") else [None]:
            change = (lambda _, leaf=leaf: leaf) if layer is None else in_layer(layer, leaf)
            seen[names, layer] = case.gap(case.server(with_leaf(case.new, names, change))).largest
    assert min(seen.values()) > 2 * TOLERANCE, min(seen, key=seen.get)


def test_weights_of_unknown_origin_are_not_explained(case):
    found = case.server(updated(case.new, seed=9))
    assert case.gap(found).largest > TOLERANCE
    assert case.sentence(found) == UNKNOWN


def test_several_explanations_that_fit_are_not_a_certainty(one_case):
    """With the wide bound of bfloat16, neighbours of the truth fit too."""
    noise = np.random.default_rng(0).standard_normal(one_case.expected.shape).astype(np.float32)
    found = one_case.server(one_case.old)
    assert "the server still has version 4's weights, all" in one_case.sentence(found + 0.02 * noise, tolerance=0.1)
    assert "the server most likely still has version 4's" in one_case.sentence(found + 2 * noise, tolerance=30.0)


def test_answers_that_are_no_numbers_are_said_to_be(one_case):
    found = one_case.expected.copy()
    found[0, 0] = np.nan
    assert "log-probs are no numbers" in one_case.sentence(found)
    padding = np.where(PROBE.completions.mask, one_case.server(one_case.old), np.nan)
    assert "still has version 4's weights" in one_case.sentence(padding)


def test_without_the_earlier_version_its_parts_are_not_guessed(one_case, tmp_path):
    gone = one_case.previous._replace(folder=tmp_path / "gone")
    for previous in (None, gone):
        assert one_case.sentence(one_case.server(one_case.old), previous=previous) == UNKNOWN


def test_a_search_that_finds_no_memory_says_so(one_case, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(diagnosis, "load_leaf", full)
    sentence = one_case.sentence(one_case.server(one_case.old))
    assert sentence.startswith(UNKNOWN) and "memory" in sentence


def test_weights_that_are_divided_over_devices_are_explained_too(tmp_path):
    model, params = toys.random_model(num_layers=1, tied_embeddings=True, vocab_size=29)
    save_hf(tmp_path / "old", model, params)
    save_hf(tmp_path / "new", model, updated(params))
    mesh = build_mesh(2, 2, 2)
    sharded, old = load_hf(tmp_path / "old", mesh=mesh)
    new = load_hf(tmp_path / "new", mesh=mesh)[1]
    sync = Publisher(tmp_path / "sync", sharded, owner="run", dtype="float32", base="base")
    previous, published = sync.write(old, 1), sync.write(new, 2)
    probe = make_probe([([3, 4, 5], [6, 7, 8])] * 3, pad_id=0, prompt_length=4, completion_length=4)
    found = np.asarray(probe_logps(model, updated(params), probe, head=params["embed"]["weight"]))
    programs = _logps._cache_size()
    sentence = explain(sharded, new, None, probe, found, published, previous, tolerance=TOLERANCE)
    assert _logps._cache_size() <= programs + 2
    assert sentence == "its files are right, the server still has version 1's output head"


# --- files that are wrong ---


def spoil(tensors, old, change):
    """The tensors of a version after something went wrong with its files."""
    up, down, q = (f"model.layers.1.{part}_proj.weight" for part in ("mlp.up", "mlp.down", "self_attn.q"))
    third = "model.layers.2.mlp.up_proj.weight"
    changes = {
        "missing": lambda: tensors.pop("lm_head.weight"),
        "surplus": lambda: tensors.update({"model.extra": tensors["model.norm.weight"]}),
        "transposed": lambda: tensors.update({q: tensors[q].T.copy()}),
        "of another shape": lambda: tensors.update({down: tensors[down].T.copy()}),
        "cut": lambda: tensors.update({up: tensors[up][:-1]}),
        "of another type": lambda: tensors.update({up: tensors[up].astype(np.float16)}),
        "an earlier one": lambda: tensors.update({name: old[name] for name in KEPT}),
        "the wrong file": lambda: tensors.update(old),
        "exchanged": lambda: tensors.update({up: tensors[third], third: tensors[up]}),
        "other values": lambda: tensors.update({up: tensors[up] + 1}),
        "no number": lambda: tensors.update({up: np.full_like(tensors[up], np.nan)}),
    }
    changes[change]()


FILES = {
    "missing": "lm_head.weight is missing",
    "surplus": "model.extra is surplus",
    "transposed": "model.layers.1.self_attn.q_proj.weight is transposed",
    "of another shape": "model.layers.1.mlp.down_proj.weight is transposed",
    "cut": "model.layers.1.mlp.up_proj.weight is float32 (23, 16), expected float32 (24, 16)",
    "of another type": "model.layers.1.mlp.up_proj.weight is float16 (24, 16), expected float32 (24, 16)",
    "an earlier one": "model.layers.1.mlp.up_proj.weight is still that of version 4, 2 tensors are wrong",
    "the wrong file": "model.embed_tokens.weight is still that of version 4, 30 tensors are wrong",
    "exchanged": "model.layers.1.mlp.up_proj.weight equals the trainer's model.layers.2.mlp.up_proj.weight, "
    "2 tensors are wrong",
    "other values": "model.layers.1.mlp.up_proj.weight has other values",
    "no number": "model.layers.1.mlp.up_proj.weight has other values",
}


@pytest.mark.parametrize("change", FILES)
def test_what_is_wrong_in_the_files_is_named(one_case, published, change):
    copied, tensors = published
    spoil(tensors, load_file(one_case.previous.folder / "model.safetensors"), change)
    save_file(tensors, copied.folder / "model.safetensors")
    sentence = one_case.sentence(one_case.server(one_case.old), published=copied)
    assert sentence == f"{copied.folder} is not what the trainer has: {FILES[change]}"


def test_a_damaged_file_is_named(one_case, published):
    copied, _ = published
    file = copied.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert str(file) in one_case.sentence(one_case.expected, published=copied)
    file.unlink()
    assert "is missing" in one_case.sentence(one_case.expected, published=copied)


def test_files_in_bfloat16_are_compared_in_it(tmp_path):
    model, params = toys.random_model(num_layers=3)
    sync = Publisher(tmp_path, model, owner="run", dtype="bfloat16", base="base")
    previous, published = sync.write(params, 1), sync.write(updated(params), 2)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    found = np.asarray(probe_logps(model, half, PROBE))
    sentence = explain(model, updated(params), None, PROBE, found, published, previous, tolerance=0.05)
    assert sentence == "its files are right, the server still has version 1's weights, all of them"


# --- adapters ---


@functools.cache
def adapters():
    model, params = toys.random_model(num_layers=3)
    old = toys.random_lora(params, size=0.2)
    return model, params, old, toys.random_lora(params, seed=1, size=0.2)


def mixed(new, old, chosen):
    return Lora({path: chosen(path, new.factors[path], old.factors[path]) for path in new.factors}, new.scale)


def second_layer(_, new, old):
    return type(new)(*(mine.at[1].set(other[1]) for mine, other in zip(new, old, strict=True)))


SERVED = {
    "answers without the adapter": lambda new, old: None,
    "still has version 1's adapter, all of it": lambda new, old: old,
    "still has version 1's adapter of mlp/down in all layers": lambda new, old: mixed(
        new, old, lambda path, mine, other: other if path == "mlp/down" else mine
    ),
    "still has version 1's adapter of layer 1": lambda new, old: mixed(new, old, second_layer),
}


@pytest.mark.parametrize("text", SERVED)
def test_a_wrong_adapter_is_named(tmp_path, text):
    model, params, old, new = adapters()
    sync = Publisher(tmp_path, model, owner="run", dtype="float32", base="base")
    previous, published = (sync.write(params, 1 + i, lora=each, kind="adapter") for i, each in enumerate((old, new)))
    found = np.asarray(probe_logps(model, params, PROBE, lora=SERVED[text](new, old)))
    expected = np.asarray(probe_logps(model, params, PROBE, lora=new))
    assert probe_gap(found, expected, PROBE.completions.mask).largest > TOLERANCE
    sentence = explain(model, params, new, PROBE, found, published, previous, tolerance=TOLERANCE)
    assert sentence == f"its files are right, the server {text}"


def test_a_wrong_adapter_file_is_named(tmp_path):
    model, params, old, new = adapters()
    sync = Publisher(tmp_path, model, owner="run", dtype="float32", base="base")
    previous, published = (sync.write(params, 1 + i, lora=each, kind="adapter") for i, each in enumerate((old, new)))
    shutil.copy(previous.folder / "adapter_model.safetensors", published.folder)
    found = np.asarray(probe_logps(model, params, PROBE, lora=old))
    sentence = explain(model, params, new, PROBE, found, published, previous, tolerance=TOLERANCE)
    assert "q_proj.lora_A.weight is still that of version 1, 12 tensors are wrong" in sentence
