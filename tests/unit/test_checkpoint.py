"""Checkpoints that come back bit for bit, or are not used: every damage to every file is tried."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from unisd_jax.checkpoint import Checkpoints
from unisd_jax.errors import UserError
from unisd_jax.models import init_lora
from unisd_jax.models.checksums import checksums
from unisd_jax.models.layout import place
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.step import StepSettings, init_state
from unisd_jax.testing import tiny_model
from unisd_jax.types import TrainState

OPTIMIZER = optax.adamw(1e-2)


def state_of(step: int, *, rank: int = 2, ema: bool = True, targets: tuple[str, ...] = ("q", "down")) -> TrainState:
    """A train state whose every leaf depends on `step`."""
    _, params = tiny_model()
    lora = init_lora(jax.random.key(0), params, rank=rank, alpha=4.0, targets=targets)
    state = init_state(lora, OPTIMIZER, StepSettings(ema_decay=0.9 if ema else None))
    random = np.random.default_rng(step)

    def fill(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(random.normal(size=leaf.shape), jnp.float32) if floating else leaf

    return jax.tree.map(fill, state)._replace(step=jnp.int32(step))


def same(a: TrainState, b: TrainState) -> bool:
    """Whether two states are equal bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def write(directory: Path, *steps: int, keep: int = 5) -> None:
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(state_of(step), data={"next_index": step}, record={"config_hash": "abc"})
    checkpoints.close()


def read(directory: Path, like: TrainState | None = None, said: list[str] | None = None):
    checkpoints = Checkpoints(directory, keep=5, say=([] if said is None else said).append)
    try:
        return checkpoints.restore(state_of(0) if like is None else like)
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the checkpoints of steps 2 and 4; copied, never changed."""
    directory = tmp_path_factory.mktemp("original") / "checkpoints"
    write(directory, 2, 4)
    return directory


@pytest.fixture
def directory(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "run" / "checkpoints")


# --- Whole ---


def test_a_state_comes_back_bit_for_bit_with_all_that_was_saved_beside_it(directory):
    restored = read(directory)
    assert same(restored.state, state_of(4))
    assert restored.data == {"next_index": 4}
    assert restored.record == {"config_hash": "abc"}


def test_an_empty_directory_holds_no_checkpoint(tmp_path):
    assert read(tmp_path / "checkpoints") is None


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state_of(1), data={"next_index": 1}, record={})
    checkpoints.save(state_of(1), data={"next_index": 99}, record={})  # the first may still be on its way
    checkpoints.wait()
    checkpoints.save(state_of(1), data={"next_index": 99}, record={})
    assert checkpoints.latest_step == 1
    checkpoints.close()
    assert read(tmp_path).data == {"next_index": 1}


def test_saving_is_not_disturbed_by_a_step_that_reuses_the_memory(tmp_path):
    """Writing goes on in the background while the next step overwrites donated buffers."""
    move = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path, keep=9), state_of(1)
    expected = {}
    for _ in range(4):
        expected[int(state.step)] = jax.tree.map(np.array, state)
        checkpoints.save(state, data={}, record={})
        state = move(state)
    checkpoints.close()
    for step in sorted(expected, reverse=True):
        restored = read(tmp_path)
        assert int(restored.state.step) == step
        assert same(restored.state, expected[step])
        shutil.rmtree(tmp_path / str(step))


def test_a_checkpoint_can_be_read_on_another_mesh(directory):
    like = place(state_of(0), build_mesh(fsdp=2, tensor=2))
    restored = read(directory, like)
    assert same(restored.state, state_of(4))
    for found, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True):
        assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)


def test_what_a_killed_save_leaves_behind_is_cleared_away(directory):
    (directory / "4").rename(directory / "4.orbax-checkpoint-tmp")
    assert same(read(directory).state, state_of(2))
    (directory / "2").rename(directory / "2.orbax-checkpoint-tmp")
    assert read(directory) is None, "killed in the very first save: a fresh start"


# --- Damaged ---


def flip(path: Path) -> None:
    """One bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": halve,
    "deleted": Path.unlink,
    "one bit flipped": flip,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_any_file_is_noticed_or_harmless(two_steps, tmp_path, damage):
    """Whatever happens to one file of the newest checkpoint: its own state or the one before, never another."""
    files = [path.relative_to(two_steps) for path in sorted((two_steps / "4").rglob("*")) if path.is_file()]
    outcomes = {}
    for number, name in enumerate(files):
        directory = shutil.copytree(two_steps, tmp_path / str(number) / "checkpoints")
        damage(directory / name)
        said: list[str] = []
        restored = read(directory, said=said)
        step = int(restored.state.step)
        assert same(restored.state, state_of(step)), f"{name}: a state that was never saved"
        assert restored.data == {"next_index": step}, name
        if step == 2:
            assert len(said) == 1 and "\n" not in said[0], said
            assert said[0].startswith("checkpoint of step 4 cannot be read ("), said
            assert str(directory.parent / "damaged_checkpoints" / "4") in said[0]
            assert (directory.parent / "damaged_checkpoints" / "4").is_dir()
            assert not (directory / "4").exists()
        outcomes[str(name)] = step
    noticed = {name for name, step in outcomes.items() if step == 2}
    assert "4/meta/metadata" in noticed
    assert any("/d/" in name for name in noticed), "damage to the arrays themselves went unnoticed"


@pytest.mark.parametrize("part", ["state", "meta", ""])
def test_a_missing_part_is_noticed(directory, part):
    shutil.rmtree(directory / "4" / part)
    assert int(read(directory).state.step) == 2


@pytest.mark.parametrize(
    ("old", "new"), [('"next_index": 4', '"next_index": 5'), ("float32", "float22"), ("unisd_jax/1", "unisd_jax/2")]
)
def test_a_record_that_was_changed_is_noticed(directory, old, new):
    """Still valid JSON: another place in the data, another model, another program. It is damage all the same."""
    path = directory / "4" / "meta" / "metadata"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    said: list[str] = []
    assert int(read(directory, said=said).state.step) == 2
    assert "its record is not the one that was saved" in said[0]


def test_exchanged_values_are_noticed(directory):
    """The record of another step, whole in itself."""
    shutil.copy(directory / "2" / "meta" / "metadata", directory / "4" / "meta" / "metadata")
    said: list[str] = []
    assert int(read(directory, said=said).state.step) == 2
    assert "its arrays are not the ones that were saved" in said[0]


def spoil(directory: Path) -> None:
    for path in directory.rglob("metadata"):
        halve(path)


def test_all_damaged_is_one_error_now_and_later(directory):
    spoil(directory)
    said: list[str] = []
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read \(steps \[4, 2\]") as error:
        read(directory, said=said)
    assert "delete" in str(error.value) and "\n" not in str(error.value)
    assert [line.split(" cannot")[0] for line in said] == ["checkpoint of step 4", "checkpoint of step 2"]
    with pytest.raises(UserError, match="every checkpoint of this run was damaged"):
        read(directory)  # never a silent start from step 0
    assert sorted(path.name for path in (directory.parent / "damaged_checkpoints").iterdir()) == ["2", "4"]


def test_after_a_fallback_the_step_can_be_saved_again(directory):
    halve(directory / "4" / "meta" / "metadata")
    checkpoints = Checkpoints(directory, keep=5, say=lambda _: None)
    assert int(checkpoints.restore(state_of(0)).state.step) == 2
    checkpoints.save(state_of(4), data={"next_index": 4}, record={})
    checkpoints.close()
    assert same(read(directory).state, state_of(4))


def test_a_disk_that_is_full_is_one_error(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)

    def full(*_, **__):
        raise ValueError("Failed to write 7206 bytes\nto file 4: " + "x" * 500 + ": No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match="a checkpoint could not be written .*No space left on device") as error:
        checkpoints.save(state_of(1), data={}, record={})
    assert "\n" not in str(error.value)
    checkpoints.close()


# --- Foreign ---


def test_other_files_are_refused_and_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no checkpoint of this program"):
        read(tmp_path)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["arrays alone", "arrays and a record"])
def test_a_foreign_orbax_checkpoint_is_refused(tmp_path, kind):
    arrays = ocp.args.StandardSave({"weights": jnp.ones((3, 3))})
    record = {} if kind == "arrays alone" else {"meta": ocp.args.JsonSave({"format": "another/1"})}
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(state=arrays, **record))
    with pytest.raises(UserError) as error:
        read(tmp_path / "checkpoints")
    assert "\n" not in str(error.value)
    expected = "none of the checkpoints" if kind == "arrays alone" else "not a checkpoint of this program"
    assert expected in str(error.value)


def test_the_default_layout_of_another_program_is_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.StandardSave({"weights": jnp.ones((3, 3))}))
    with pytest.raises(UserError):
        read(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        (dict(rank=3), r"\[2, 32, 2\].*needs \[\[2, 32, 3\]"),
        (dict(targets=("q", "down", "up")), "up.* is missing"),
        (dict(targets=("q",)), "down.* needs none"),
        (dict(ema=False), "teacher.* needs none"),
    ],
)
def test_a_state_of_another_shape_is_refused_and_left_alone(directory, like, expected):
    with pytest.raises(UserError, match=expected) as error:
        read(directory, state_of(0, **like))
    assert "belongs to another model or configuration" in str(error.value)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4"]


# --- Checksums ---


def test_checksums_see_every_bit_and_the_order():
    values = jnp.arange(6, dtype=jnp.float32)
    variants = [
        values,
        values.at[3].set(jnp.nextafter(values[3], jnp.inf)),
        values.at[0].set(-0.0),
        values[::-1],
        values.reshape(2, 3),
        values.astype(jnp.bfloat16),
        values.astype(jnp.int32),
    ]
    found = [json.dumps(checksums({"x": value})) for value in variants]
    assert len(set(found)) == len(found)
    assert checksums({"x": values}) == checksums({"x": jnp.array(values)})


def test_checksums_do_not_depend_on_the_sharding():
    leaves = {"a": jnp.arange(64, dtype=jnp.float32).reshape(8, 8)}
    mesh = build_mesh(fsdp=4)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert checksums(leaves) == checksums(jax.device_put(leaves, sharding))
