"""The train step over a mesh, compiled and run as a training does it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import toys

from unisd_jax.models import HeadOptions
from unisd_jax.models.layout import place
from unisd_jax.optim import adamw
from unisd_jax.parallel.sharding import batch_sharding, head_layout, jit_step
from unisd_jax.step import init_state, train_step
from unisd_jax.types import Contexts

# A large epsilon: Adam's first steps otherwise turn rounding of tiny gradients into whole steps.
OPTIMIZER = adamw(lambda step: 0.05, b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.01, max_grad_norm=1.0)


@functools.cache
def toy(**changes):
    return toys.random_model(**changes)


def student(kind):
    _, params = toy()
    return params if kind == "full" else toys.random_lora(params, targets=("q", "down"))


def all_views():
    """A batch with auxiliary and negative views."""
    views, rng = toys.random_views(), np.random.default_rng(7)
    contexts = Contexts(*(x.reshape(8, 2, -1) for x in toys.left_padded(rng, 16, 7)))
    return views._replace(contexts=contexts, negative=toys.left_padded(rng, 8, 8))


def on_mesh(model, mesh, *, divided=True):
    """The model as a run sets it up; without `divided` the compiler chooses how the head is divided."""
    layout = head_layout(mesh) if divided else None
    return dataclasses.replace(model, head_options=HeadOptions(layout=layout), mesh=mesh if mesh.size > 1 else None)


def compiled_step(model, mesh, settings, state, base, views):
    """The program for these arguments. Ahead of time, so that it refuses a state that has not kept its layout."""
    step = functools.partial(train_step, model=model, optimizer=OPTIMIZER, settings=settings)
    return jit_step(step, state, mesh).lower(state, base, views).compile()


def two_steps(kind, mesh, settings, views, *, divided=True):
    """(state after two steps, metrics of the second) from a state and a batch laid out over `mesh`."""
    model, params = toy()
    model, base = on_mesh(model, mesh, divided=divided), place(params, mesh)
    # Copies: the step takes over the memory of its state.
    state = place(init_state(jax.tree.map(jnp.copy, student(kind)), OPTIMIZER, settings), mesh)
    views = jax.device_put(views, batch_sharding(mesh))
    compiled, before = compiled_step(model, mesh, settings, state, base, views), state
    state, _ = compiled(state, base, views)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.student)), "its memory is reused"
    return compiled(state, base, views)
