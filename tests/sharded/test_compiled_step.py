"""What one device holds and sends in a step under fsdp, read from the compiled program."""

import re

import jax
import jax.numpy as jnp
import pytest
import toys
from steps import OPTIMIZER, all_views, compiled_step, on_mesh

from unisd_jax.losses import Agreement, Objective
from unisd_jax.models.layout import path_name, tree_shardings
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.parallel.sharding import batch_sharding, replicated
from unisd_jax.step import StepSettings, init_state

# Sizes that are no other's product, so that a shape says what it is of; all divisible by 8.
SIZES = dict(
    vocab_size=416, hidden_size=80, intermediate_size=176, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=16
)
STAR = StepSettings(
    Objective(temperature=0.8, clip_quantile=0.83, agreement=Agreement(), contrast_weight=0.1, matching_weight=0.1),
    ema_decay=0.9,
)
COLLECTIVE = re.compile(
    r"= (\(?\w+\[.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
SHAPE = re.compile(r"(\w+)\[([\d,]+)\]")


def program(kind, shape):
    """(its text, the parameters' shapes) of the step of UniSD* with abstract arguments."""
    mesh = build_mesh(*shape)
    model, params = toys.build(**SIZES)
    model = on_mesh(model, mesh)
    adapter = jax.eval_shape(lambda: toys.zero_lora(params))
    state = jax.eval_shape(lambda tree: init_state(tree, OPTIMIZER, STAR), params if kind == "full" else adapter)
    views = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, all_views()))

    def on(tree, shardings):
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)

    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    model_views = on(views, jax.tree.map(lambda _: batch_sharding(mesh), views))
    compiled = compiled_step(
        model, mesh, STAR, on(state, tree_shardings(state, mesh)), on(base, tree_shardings(base, mesh)), model_views
    )
    return compiled.as_text(), params


def shapes_in(text):
    return {tuple(int(size) for size in sizes.split(",")) for _, sizes in SHAPE.findall(text)}


def collectives(text):
    """{(kind, shape): how often}; those in a loop count once."""
    found = {}
    for types, kind in COLLECTIVE.findall(text):
        for _, sizes in SHAPE.findall(types):
            found[kind, sizes] = found.get((kind, sizes), 0) + 1
    return found


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2, 4, 1), "full"),
        ((1, 4, 2), "lora"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((1, 8, 1), "lora"), ((1, 8, 1), "full"), ((2, 4, 1), "lora"), ((1, 4, 2), "full"))
        ),
    ],
    ids=str,
)
def test_no_device_holds_a_whole_parameter_or_head_gradient(shape, kind):
    text, params = program(kind, shape)
    sent = collectives(text)
    print(f"\n{kind} {shape}:", *(f"{n} x {name} [{sizes}]" for (name, sizes), n in sorted(sent.items())), sep="\n  ")
    held = shapes_in(text)
    matrices = [
        (path_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim > 1
    ]
    for name, whole in matrices:
        if "norm" in name:
            continue
        assert whole not in held and whole[::-1] not in held, f"{name} {whole} is whole on every device"
    vocabulary, width = SIZES["vocab_size"], SIZES["hidden_size"]
    assert (vocabulary // (shape[1] * shape[2]), width) in held, "each device has its rows of the vocabulary"
    # What is gathered is one layer's matrix at a time, tokens, or smaller: never the vocabulary.
    assert not any(str(vocabulary) in sizes.split(",") for _, sizes in sent)


def test_the_search_finds_a_head_that_is_gathered():
    mesh = build_mesh(1, 8, 1)
    rows = batch_sharding(mesh)
    shape = SIZES["vocab_size"], SIZES["hidden_size"]
    head = tree_shardings({"head": {"weight": jax.ShapeDtypeStruct(shape, jnp.float32)}}, mesh)["head"]["weight"]

    def logsumexp(x, w):
        return jax.nn.logsumexp(x @ jax.lax.with_sharding_constraint(w, replicated(mesh)).T, axis=-1)

    arguments = (
        jax.ShapeDtypeStruct((64, shape[1]), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=head),
    )
    text = jax.jit(logsumexp, out_shardings=rows).lower(*arguments).compile().as_text()
    assert shape in shapes_in(text)
    assert any(str(shape[0]) in sizes.split(",") for _, sizes in collectives(text))
