"""One device or eight, however they are arranged: the same loss, the same weights, each device with its own part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec
from steps import OPTIMIZER, all_views, student, toy, two_steps

from unisd_jax.errors import ConfigError, UserError
from unisd_jax.losses import Agreement, Objective
from unisd_jax.models import load_hf, save_hf
from unisd_jax.models.layout import leaf_spec, path_name, place, tree_shardings
from unisd_jax.parallel.mesh import AXES, build_mesh
from unisd_jax.parallel.sharding import batch_sharding, head_layout, replicated
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.step import StepSettings, init_state

MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4)]
SETTINGS = StepSettings(Objective(alpha=0.5, temperature=0.8), ema_decay=0.9)
STAR = StepSettings(
    Objective(temperature=0.8, clip_quantile=0.83, agreement=Agreement(), contrast_weight=0.1, matching_weight=0.1),
    ema_decay=0.9,
)


def steps_views(settings):
    return toys.random_views() if settings is SETTINGS else all_views()


@functools.cache
def reference(kind, settings=SETTINGS):
    """What one device computes."""
    state, metrics = two_steps(kind, build_mesh(), settings, steps_views(settings))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize(
    "shape", [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])], ids=str
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_any_mesh_computes_what_one_device_computes(kind, shape):
    expected, expected_metrics = reference(kind)
    mesh = build_mesh(*shape)
    state, metrics = two_steps(kind, mesh, SETTINGS, toys.random_views())
    for name, value in expected_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert float(metrics["loss"]) > 0.01 and int(state.step) == 2
    found = jax.device_get(state)
    toys.assert_trees_close((found.student, found.optimizer), (expected.student, expected.optimizer), atol=5e-5)
    if kind == "lora":
        toys.assert_trees_close(toys.products(found.teacher), toys.products(expected.teacher), atol=5e-5)
    else:
        toys.assert_trees_close(found.teacher, expected.teacher, atol=5e-5)
    wanted = tree_shardings(state, mesh)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_head_that_is_left_to_the_compiler_computes_the_same():
    expected, expected_metrics = reference("full")
    state, metrics = two_steps("full", build_mesh(2, 2, 2), SETTINGS, toys.random_views(), divided=False)
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-4)
    toys.assert_trees_close(jax.device_get(state).student, expected.student, atol=5e-5)


def test_the_head_is_divided_as_the_batch_and_the_output_matrix_are():
    assert head_layout(build_mesh()) is None
    divided = {
        (8, 1, 1): (("data",), ()),
        (2, 2, 2): (("data",), ("tensor", "fsdp")),
        (1, 4, 1): ((), ("fsdp",)),
        (1, 1, 4): ((), ("tensor",)),
    }
    for shape, (tokens, vocab) in divided.items():
        layout = head_layout(build_mesh(*shape))
        assert (layout.tokens, layout.vocab) == (tokens, vocab)


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)], ids=str)
def test_any_mesh_computes_all_five_mechanisms_alike(shape):
    """EMA, token agreement, contrast, matching and a quantile clip, whose weights and ceiling need the whole batch."""
    expected, expected_metrics = reference("lora", STAR)
    state, metrics = two_steps("lora", build_mesh(*shape), STAR, all_views())
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=2e-4, abs=1e-6), name
    found = jax.device_get(state)
    toys.assert_trees_close((found.student, found.optimizer), (expected.student, expected.optimizer), atol=5e-5)
    toys.assert_trees_close(toys.products(found.teacher), toys.products(expected.teacher), atol=5e-5)
    for name in ("clip_share", "contrast_active_share", "agreement_weight", "gradient_share_matching"):
        assert 0 < float(metrics[name]) < 1, name


def shard_shapes(tree):
    """{path: (whole shape, shape on each device)}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): (leaf.shape, leaf.addressable_shards[0].data.shape) for path, leaf in leaves}


def test_parameters_are_really_divided():
    """fsdp and tensor each take their dimension; data takes none."""
    mesh = build_mesh(2, 2, 2)
    state = init_state(student("lora"), OPTIMIZER, SETTINGS)
    shapes = shard_shapes(place({"base": toy()[1], "state": state._asdict()}, mesh))
    assert shapes["base/layers/attention/q/kernel"] == ((2, 16, 16), (2, 8, 8))
    assert shapes["base/layers/attention/k/kernel"] == ((2, 16, 8), (2, 8, 4))
    assert shapes["base/layers/attention/o/kernel"] == ((2, 16, 16), (2, 8, 8))
    assert shapes["base/layers/mlp/up/kernel"] == ((2, 16, 24), (2, 8, 12))
    assert shapes["base/layers/mlp/down/kernel"] == ((2, 24, 16), (2, 12, 8))
    assert shapes["base/embed/weight"] == shapes["base/head/weight"] == ((32, 16), (8, 16))
    assert shapes["base/norm/scale"] == ((16,), (16,))
    # Adapters, their EMA at twice the rank and the optimizer's moments follow the matrices they belong to.
    (moment,) = [path for path in shapes if path.endswith("mu/factors/mlp/down/a")]
    for prefix, rank in (
        ("state/student/factors", 2),
        ("state/teacher/factors", 4),
        (moment[: -len("/mlp/down/a")], 2),
    ):
        assert shapes[f"{prefix}/attention/q/a"] == ((2, 16, rank), (2, 8, rank))
        assert shapes[f"{prefix}/attention/q/b"] == ((2, rank, 16), (2, rank, 4))
        assert shapes[f"{prefix}/mlp/down/a"] == ((2, 24, rank), (2, 6, rank))
        assert shapes[f"{prefix}/mlp/down/b"] == ((2, rank, 16), (2, rank, 8))


def test_each_axis_divides_its_own_dimension():
    assert leaf_spec("layers/attention/q/kernel", (2, 16, 16), build_mesh(1, 4, 2)) == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert leaf_spec("layers/mlp/down/kernel", (2, 24, 16), build_mesh(1, 4, 2)) == PartitionSpec(
        None, "tensor", "fsdp"
    )
    assert leaf_spec("layers/attention/q/bias", (2, 16), build_mesh(1, 4, 2)) == PartitionSpec(None, "tensor")


def test_what_does_not_divide_is_replicated():
    mesh = build_mesh(1, 2, 4)
    assert leaf_spec("embed/weight", (32, 16), mesh) == PartitionSpec(("tensor", "fsdp"), None)
    assert leaf_spec("embed/weight", (33, 16), mesh) == PartitionSpec(None, None)
    assert leaf_spec("layers/mlp/up/kernel", (2, 15, 24), mesh) == PartitionSpec(None, None, "tensor")
    assert leaf_spec("layers/mlp/up/kernel", (2, 16, 26), mesh) == PartitionSpec(None, "fsdp", None)
    assert leaf_spec("layers/mlp_norm/scale", (2, 16), mesh) == PartitionSpec()
    assert leaf_spec("step", (), mesh) == PartitionSpec()
    placed = place({"embed": {"weight": jnp.zeros((33, 16))}}, mesh)
    assert placed["embed"]["weight"].is_fully_replicated


def test_every_matrix_of_the_decoder_is_in_the_table():
    """A parameter whose name the table does not know would silently be kept whole on every device."""
    mesh = build_mesh(1, 2, 2)
    model, params = toys.random_model(family="qwen2", attention_bias=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        assert any(leaf_spec(name, leaf.shape, mesh)) != name.endswith("scale"), name


def test_rows_go_to_data_and_fsdp():
    views = jax.device_put(toys.random_views(), batch_sharding(build_mesh(2, 2, 2)))
    assert views.student.ids.addressable_shards[0].data.shape == (2, 6)
    assert len({shard.device for shard in views.student.ids.addressable_shards}) == 8
    assert replicated(build_mesh(8)).is_fully_replicated


def test_loading_onto_a_mesh(tmp_path):
    model, params = toy()
    save_hf(tmp_path / "model", model, params)
    mesh = build_mesh(1, 2, 4)
    loaded_model, loaded = load_hf(tmp_path / "model", mesh=mesh)
    assert loaded_model.config == model.config
    toys.assert_trees_close(loaded, params)
    assert shard_shapes(loaded)["layers/mlp/down/kernel"] == ((2, 24, 16), (2, 6, 8))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(loaded))


def test_sampling_from_weights_on_a_mesh():
    model, params = toy()
    prompts = toys.left_padded(np.random.default_rng(0), 4, 6)
    rollouts = []
    for weights in (params, place(params, build_mesh(2, 2, 2))):
        sampler = JaxSampler(model)
        sampler.publish(weights, 0)
        rollouts.append(sampler.generate(*prompts, Sampling(5, (3,), 0), key=jax.random.key(1), version=0))
    one, eight = rollouts
    np.testing.assert_array_equal(one.ids, eight.ids)
    np.testing.assert_allclose(one.logps, eight.logps, atol=1e-4)


def test_the_mesh():
    mesh = build_mesh(2, 1, 4)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert build_mesh().devices.size == 1
    assert len({device.id for device in build_mesh(2, 2, 2).devices.flat}) == 8


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError) as error:
        build_mesh(data=4, fsdp=2, tensor=2)
    message = str(error.value)
    assert "mesh.data x mesh.fsdp x mesh.tensor = 4 x 2 x 2 = 16 devices, found 8" in message and "\n" not in message
    assert issubclass(ConfigError, UserError)
