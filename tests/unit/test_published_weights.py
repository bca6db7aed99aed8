"""Versions of the weights as files: what was published is what is read, whole or not there, never more than two."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from safetensors.numpy import load_file

from unisd_jax.errors import ConfigError, UserError
from unisd_jax.models import Model, hf_io, hf_tensors, load_hf, load_peft, merge, peft_io, save_hf, save_peft
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.rollout import folders, weights
from unisd_jax.rollout.folders import sync_folder
from unisd_jax.rollout.weights import FORMAT, Manifest, Publisher, needed_bytes, planned_tensors

VARIANTS = {
    "untied": {},
    "tied": dict(tied_embeddings=True),
    "qwen2": dict(family="qwen2", attention_bias=True, tied_embeddings=True),
    "qwen3": dict(family="qwen3"),
    "gemma3": dict(
        family="gemma3_text", tied_embeddings=True, query_scalar=6.0, num_layers=3, sliding_window=3,
        sliding_layers=(True, True, False), local_rope_theta=100.0,
    ),
}  # fmt: skip


def publisher(folder, model, *, owner="run-1a2b3c4d", dtype="float32", base="org/base"):
    return Publisher(folder, model, owner=owner, dtype=dtype, base=base)


def stored(published):
    return {name: value for file in published.folder.glob("*.safetensors") for name, value in load_file(file).items()}


def manifest_of(folder):
    fields = json.loads((folder / "manifest.json").read_text())
    assert fields.pop("format") == FORMAT
    return Manifest(**fields)


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = np.asarray(value)
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def as_checkpoint(published, model):
    (published.folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    return load_hf(published.folder)[1]


# --- what is in the files ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_published_is_loaded_bit_for_bit_and_has_a_head(tmp_path, variant):
    model, params = toys.random_model(**VARIANTS[variant])
    published = publisher(tmp_path, model).write(params, 3)
    head = "embed" if model.config.tied_embeddings else "head"
    assert_same_tensors(stored(published), hf_tensors(model, params) | {"lm_head.weight": params[head]["weight"]})
    jax.tree.map(np.testing.assert_array_equal, as_checkpoint(published, model), params)


def test_weights_are_stored_in_the_type_that_was_asked_for(tmp_path):
    model, params = toys.random_model()
    published = publisher(tmp_path, model, dtype="bfloat16").write(params, 1)
    assert_same_tensors(stored(published), {k: v.astype(jnp.bfloat16) for k, v in hf_tensors(model, params).items()})
    assert published.manifest.dtype == "bfloat16"


def test_large_weights_go_into_several_files(tmp_path, monkeypatch):
    model, params = toys.random_model(tied_embeddings=True)
    monkeypatch.setattr(weights, "SHARD_BYTES", 5000)
    published = publisher(tmp_path, model).write(params, 1)
    assert len(list(published.folder.glob("model-*-of-*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, as_checkpoint(published, model), params)


def test_weights_of_eight_devices_are_the_same_version_as_those_of_one(tmp_path):
    """With a vocabulary that the devices cannot share evenly."""
    model, params = toys.random_model(vocab_size=29, tied_embeddings=True)
    save_hf(tmp_path / "model", model, params)
    sharded_model, sharded = load_hf(tmp_path / "model", mesh=build_mesh(1, 2, 4))
    one = publisher(tmp_path / "one", model).write(params, 1)
    eight = publisher(tmp_path / "eight", sharded_model).write(sharded, 1)
    assert eight.label == one.label and stored(eight)["lm_head.weight"].shape == (29, 16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_an_adapter_is_merged_as_the_trainer_merges_it(tmp_path, dtype):
    model, params = toys.random_model()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    lora = toys.random_lora(params, targets=("q", "o", "up"))
    before = jax.tree.map(np.array, params)
    published = publisher(tmp_path, model, dtype=dtype).write(params, 1, lora=lora)
    assert_same_tensors(stored(published), hf_tensors(model, merge(params, lora)))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_published_adapter_is_the_one_that_save_peft_writes(tmp_path):
    model, params = toys.random_model()
    lora = toys.random_lora(params)
    published = publisher(tmp_path / "sync", model).write(params, 1, lora=lora, kind="adapter")
    save_peft(tmp_path / "peft", model, lora, base="org/base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (published.folder / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert_same_tensors(stored(published), load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert manifest_of(published.folder) == published.manifest
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(lora))
    assert published.manifest.kind == "adapter" and published.manifest.size == size
    assert load_peft(published.folder, model, params).scale == lora.scale


# --- the manifest and the label ---


def test_the_manifest_says_what_is_there(tmp_path):
    model, params = toys.random_model(tied_embeddings=True)
    published = publisher(tmp_path, model).write(params, 7)
    manifest, tensors = manifest_of(published.folder), stored(published)
    assert manifest == published.manifest
    assert manifest.tensors == {name: list(value.shape) for name, value in tensors.items()}
    assert manifest.size == sum(value.nbytes for value in tensors.values()) == needed_bytes(model, "float32")
    assert (manifest.owner, manifest.version, manifest.kind) == ("run-1a2b3c4d", 7, "weights")
    assert published.folder == tmp_path / "v00000007" and published.label == f"run-1a2b3c4d/7/{manifest.content}"
    assert len(manifest.content) == 12 and published.seconds_convert > 0 and published.seconds_write > 0


def test_the_content_follows_the_weights_and_nothing_else(tmp_path):
    model, params = toys.random_model()
    lora = toys.random_lora(params)
    other = jax.tree.map(lambda x: x, params)
    other["norm"]["scale"] = params["norm"]["scale"].at[3].add(1e-6)
    sync = publisher(tmp_path, model)
    first = sync.write(params, 1).manifest.content
    reordered = dict(reversed(params.items()))
    assert sync.write(reordered, 2).manifest.content == first
    assert publisher(tmp_path, model, owner="another").write(params, 3).manifest.content == first
    contents = [first, *(sync.write(other, 4, lora=each).manifest.content for each in (None, lora))]
    for scale in (2.0, 3.0):
        scaled = type(lora)(lora.factors, scale)
        contents.append(sync.write(params, 5, lora=scaled, kind="adapter").manifest.content)
    assert len(set(contents)) == 5


@pytest.mark.parametrize("kind", ["weights", "adapter"])
def test_every_process_writes_under_the_same_label(tmp_path, kind):
    model, params = toys.random_model()
    lora, fetched = toys.random_lora(params), []
    one = publisher(tmp_path / "one", model).write(params, 1, lora=lora, kind=kind)
    other = publisher(tmp_path / "two", model)
    two = other.write(params, 1, lora=lora, kind=kind, fetch=lambda x: fetched.append(x) or np.asarray(x))
    assert two.label == one.label and len(fetched) >= 4
    assert {name: value.tobytes() for name, value in stored(two).items()} == {
        name: value.tobytes() for name, value in stored(one).items()
    }


def test_what_adapters_are_put_on_stays_beside_the_versions(tmp_path):
    model, params = toys.random_model()
    sync = publisher(tmp_path / "sync", model)
    base = sync.write(params, 0, name=weights.BASE)
    for version in (1, 2, 3):
        sync.write(params, version, lora=toys.random_lora(params, version), kind="adapter")
    assert base.folder.is_dir() and sorted(base.folder.parent.iterdir())[0] == base.folder
    assert versions(tmp_path / "sync") == ["base", "v00000002", "v00000003"]
    sync.close()
    assert not (tmp_path / "sync").exists()


# --- what is refused, and what an error leaves behind ---


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf, 3.4e38], ids=["nan", "infinity", "infinity as bfloat16"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, bad):
    model, params = toys.random_model()
    gate = params["layers"]["mlp"]["gate"]
    gate["kernel"] = gate["kernel"].at[1, 2, 3].set(bad)
    with pytest.raises(UserError, match=r"NaN or infinity.*model.layers.1.mlp.gate_proj.weight"):
        publisher(tmp_path, model, dtype="bfloat16").write(params, 1)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    model, params = toys.random_model()
    lora = toys.random_lora(params, size=np.nan)
    with pytest.raises(UserError, match=r"adapter holds NaN.*q_proj"):
        publisher(tmp_path, model).write(params, 1, lora=lora, kind="adapter")
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "missing": lambda params: params["layers"]["mlp"].pop("up"),
    "surplus": lambda params: params.update(head={"weight": params["embed"]["weight"]}),
    "transposed": lambda params: params["layers"]["mlp"]["up"].update(
        kernel=params["layers"]["mlp"]["up"]["kernel"].swapaxes(1, 2)
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_of_another_form_are_refused(tmp_path, wrong):
    model, params = toys.random_model(tied_embeddings=True)
    WRONG[wrong](params)
    with pytest.raises(UserError, match="the weights' (layers/mlp/up/kernel|head/weight) is"):
        publisher(tmp_path, model).write(params, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mistake", ["order", "shape", "type"])
def test_tensors_that_are_not_the_planned_ones_do_not_appear(tmp_path, monkeypatch, mistake):
    model, params = toys.random_model()
    plan = planned_tensors(model, "float32")
    changed = {
        "order": [plan[1], plan[0], *plan[2:]],
        "shape": [plan[0]._replace(shape=plan[0].shape[::-1]), *plan[1:]],
        "type": [plan[0]._replace(dtype=np.dtype(np.float16)), *plan[1:]],
    }
    monkeypatch.setattr(weights, "planned_tensors", lambda *_: changed[mistake])
    with pytest.raises(UserError, match="expected was"):
        publisher(tmp_path, model).write(params, 1)
    assert list(tmp_path.iterdir()) == []


def full_disk(number):
    """`new_tensor_file` whose third tensor meets an error of the file system."""
    true = hf_io.new_tensor_file

    @contextlib.contextmanager
    def file(path, entries):
        with true(path, entries) as append:
            written = []

            def limited(value):
                written.append(append(value))
                if len(written) == 3:
                    raise OSError(number, os.strerror(number))

            yield limited

    return file


@pytest.mark.parametrize("kind", ["weights", "adapter"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_version_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, kind, number):
    model, params = toys.random_model()
    lora, sync = toys.random_lora(params), publisher(tmp_path, model)
    first = sync.write(params, 1)
    module = hf_io if kind == "weights" else peft_io
    with monkeypatch.context() as patch:
        patch.setattr(module, "new_tensor_file", full_disk(number))
        with pytest.raises(OSError if number == errno.EIO else UserError) as error:
            sync.write(params, 2, lora=lora, kind=kind)
    if number != errno.EIO:
        message = str(error.value)
        assert str(tmp_path) in message and "rollout.vllm.sync_dir" in message and "GB are needed" in message
    assert [path.name for path in tmp_path.iterdir()] == ["v00000001"] and manifest_of(first.folder)
    assert sync.write(params, 2, lora=lora, kind=kind).folder.is_dir()


# --- which versions stay ---


def versions(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_versions_stay(tmp_path):
    model, params = toys.random_model()
    sync = publisher(tmp_path / "sync", model)
    seen = []
    for version in (1, 2, 5, 6):
        sync.write(params, version)
        seen.append(versions(tmp_path / "sync"))
    assert seen == [
        ["v00000001"], ["v00000001", "v00000002"], ["v00000002", "v00000005"], ["v00000005", "v00000006"]
    ]  # fmt: skip
    sync.remove_before(6)
    assert versions(tmp_path / "sync") == ["v00000006"]
    sync.close()
    assert not (tmp_path / "sync").exists()


def test_an_evaluation_of_the_base_between_two_equal_versions_needs_no_more_room(tmp_path, monkeypatch):
    model, params = toys.random_model()
    sync, write, seen = publisher(tmp_path, model), weights.write_shards, []
    monkeypatch.setattr(weights, "write_shards", lambda *args: seen.append(versions(tmp_path)) or write(*args))
    for version in (9, 10, 0, 10):
        sync.write(params, version)
    assert [len([name for name in names if name[0] == "v"]) for names in seen] == [0, 1, 1, 1], "and the one written"


def test_there_is_room_for_two_versions_at_most_while_one_is_written(tmp_path, monkeypatch):
    model, params = toys.random_model()
    sync, seen, write = publisher(tmp_path, model), [], weights.write_shards
    monkeypatch.setattr(weights, "write_shards", lambda *args: seen.append(versions(tmp_path)) or write(*args))
    for version in (1, 2, 3):
        sync.write(params, version)
    assert max(len(names) for names in seen) == 2


def test_what_an_earlier_process_of_the_run_left_goes_and_other_files_stay(tmp_path):
    model, params = toys.random_model()
    publisher(tmp_path, model).write(params, 9)
    (tmp_path / "vocabulary").mkdir()
    sync = publisher(tmp_path, model)
    sync.write(params, 8)
    assert versions(tmp_path) == ["v00000008", "vocabulary"]
    sync.close()
    assert versions(tmp_path) == ["vocabulary"]


def test_a_version_that_is_written_again_is_replaced(tmp_path):
    model, params = toys.random_model()
    sync = publisher(tmp_path, model)
    sync.write(params, 1)
    again = sync.write(jax.tree.map(lambda x: 2 * x, params), 1)
    assert versions(tmp_path) == ["v00000001"] and manifest_of(again.folder) == again.manifest


# --- where they go ---


@pytest.fixture
def shared_memory(tmp_path, monkeypatch):
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(folders, "SHARED_MEMORY", folder)
    return folder


def test_shared_memory_is_used_where_two_versions_fit(tmp_path, shared_memory):
    run = tmp_path / "run"
    assert sync_folder(None, run, needed=1000, owner="a") == shared_memory / f"unisd-a-{os.getpid()}"
    assert sync_folder(None, run, needed=10**18, owner="a") == run / "sync" / "a", "another owner has another folder"
    shared_memory.rename(tmp_path / "gone")
    assert sync_folder(None, run, needed=1000, owner="a") == run / "sync" / "a"


def test_nothing_is_left_in_the_run_s_directory(tmp_path, shared_memory):
    run = tmp_path / "run"
    model, params = toys.random_model()
    both = [publisher(sync_folder(None, run, needed=10**18, owner=owner), model, owner=owner) for owner in ("a", "b")]
    for one in both:
        one.write(params, 1)
    both[0].close()
    assert [path.name for path in (run / "sync").iterdir()] == ["b"]
    both[1].close()
    assert list(run.iterdir()) == []


def test_a_folder_that_was_asked_for_is_made_and_each_owner_has_its_own(tmp_path, shared_memory):
    option = tmp_path / "new" / "sync"
    one, two = (sync_folder(str(option), tmp_path, needed=1, owner=owner) for owner in ("a", "b"))
    assert one.parent == two.parent == option and one != two and one.is_dir() and two.is_dir()
    model, params = toys.random_model()
    first, second = publisher(one, model, owner="a"), publisher(two, model, owner="b")
    kept = first.write(params, 1)
    second.write(params, 1)
    second.close()
    assert manifest_of(kept.folder).owner == "a"


def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch, shared_memory):
    """A server has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    assert sync_folder("here", tmp_path, needed=1, owner="a") == tmp_path / "here" / "a"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, shared_memory):
    (tmp_path / "file").write_text("")
    for option in (tmp_path / "file", "/proc/nowhere"):
        with pytest.raises(ConfigError, match=r"rollout\.vllm\.sync_dir"):
            sync_folder(str(option), tmp_path, needed=1, owner="a")


def test_what_dead_processes_left_is_removed_and_what_live_ones_use_is_not(tmp_path, shared_memory):
    program = (
        "import sys, time; from pathlib import Path; from unisd_jax.rollout import folders\n"
        f"folders.SHARED_MEMORY = Path({str(shared_memory)!r})\n"
        "print(folders.sync_folder(None, Path('run'), needed=1, owner=sys.argv[1]), flush=True); time.sleep(100)"
    )
    kept = ["other", "unisd-mine-7", "unisd-shared"]  # they hold something else than versions
    other = subprocess.Popen([sys.executable, "-c", program, "b"], stdout=subprocess.PIPE, text=True)
    try:
        used = Path(other.stdout.readline().strip())
        (used / "v00000001").mkdir()
        (shared_memory / "unisd-a-1" / "v00000001").mkdir(parents=True)
        (shared_memory / "other").mkdir()
        (shared_memory / "unisd-shared" / "a").mkdir(parents=True)
        (shared_memory / "unisd-mine-7" / "a").mkdir(parents=True)
        sync_folder(None, tmp_path, needed=1, owner="a")
        assert versions(shared_memory) == sorted([*kept, used.name, f"unisd-a-{os.getpid()}"])
    finally:
        other.kill()
        other.wait()
    sync_folder(None, tmp_path, needed=1, owner="a")
    assert versions(shared_memory) == sorted([*kept, f"unisd-a-{os.getpid()}"])


def test_a_folder_that_another_process_removes_while_it_is_made_is_made_again(tmp_path, shared_memory, monkeypatch):
    locked, removed = folders._locked, []

    def removed_first(folder):
        lock = locked(folder)
        if not removed:
            removed.append(folder)
            folder.rmdir()
        return lock

    monkeypatch.setattr(folders, "_locked", removed_first)
    folder = sync_folder(None, tmp_path, needed=1, owner="raced")
    assert removed == [folder] and folder.is_dir()
    monkeypatch.undo()
    assert folders._locked(folder) is None, "it is held"


def test_the_plan_follows_the_configuration_and_not_the_weights():
    model, _ = Model.build(toys.build()[0].config, vocab_multiple=5)
    assert {entry.name: entry.shape for entry in planned_tensors(model, "float32")}["lm_head.weight"] == (32, 16)
