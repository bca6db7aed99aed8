"""The work and the memory of the kernels, from programs that are traced or compiled but, at full size, never run.

Unlike times these numbers are the same on every machine. Work is counted in products: one is 2·N·H·V operations, what
it takes to form the logits of all tokens once.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.kernels import (
    fused_linear_jsd,
    fused_linear_jsd_loss,
    fused_linear_jsd_value_and_grad,
    fused_linear_logprob,
)
from unisd_jax.kernels.fused_linear_jsd import dispatch, gradients
from unisd_jax.kernels.fused_linear_jsd.rows import Settings
from unisd_jax.kernels.fused_linear_jsd.tokens import chunk_sizes
from unisd_jax.kernels.fused_linear_jsd.types import Operands

LARGE = (8192, 3584, 152064)  # tokens, width and vocabulary of a batch for a 7B model
MEDIUM = (4096, 64, 32768)
ALPHAS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """Not here: programs are compiled as users compile them."""


# Counting


def inner_jaxprs(equation):
    for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        inner = getattr(parameter, "jaxpr", parameter)
        if hasattr(inner, "eqns"):
            yield inner


def operations(jaxpr, turns):
    """Multiplications and additions of all matrix products, loops multiplied out.

    `turns` yields how often each loop without a fixed number of turns goes round, in the order of the program.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == "cond":
            total += max(operations(branch.jaxpr, turns) for branch in parameters["branches"])
        elif name == "while":
            once = operations(parameters["body_jaxpr"].jaxpr, turns)
            total += once * next(turns) if once else 0
        else:
            times = parameters["length"] if name == "scan" else 1
            total += times * sum(operations(inner, turns) for inner in inner_jaxprs(equation))
    return total


def sizes(jaxpr):
    """Element counts of everything a jaxpr computes, loop bodies included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in inner_jaxprs(equation):
            yield from sizes(inner)


def arrays(shape, dtype=jnp.bfloat16, masked=False):
    """What a call is traced with: shapes alone. A mask is None without `masked`."""
    tokens, width, vocab = shape
    make = jax.ShapeDtypeStruct
    hidden, head = make((tokens, width), dtype), make((vocab, width), dtype)
    mask = make((tokens,), bool) if masked else None
    return (hidden, head, hidden, head), make((tokens,), jnp.int32), make((tokens,), jnp.float32), mask


def loss(hidden, head, taught, teacher_head, targets, weights, mask, **options):
    return fused_linear_jsd_loss(hidden, head, taught, teacher_head, targets, weights, mask=mask, **options)


def summed(*names):
    """A loss that a caller sums up from the per-token function."""

    def function(hidden, head, taught, teacher_head, targets, weights, mask, **options):
        scores = fused_linear_jsd(hidden, head, taught, teacher_head, targets, mask=mask, **options)
        return sum(jnp.sum(weights * getattr(scores, name)) for name in names), scores

    return function


def logprob(hidden, head, _, __, targets, weights, mask, **options):
    del options["alpha"]
    scores = fused_linear_logprob(hidden, head, targets, mask=mask, **options)
    return jnp.sum(weights * scores.logp), scores


def trainer(hidden, head, taught, teacher_head, targets, weights, mask, *, trained, **options):
    options |= {"mask": mask, "head_gradient": trained}
    return fused_linear_jsd_value_and_grad(hidden, head, taught, teacher_head, targets, weights, **options)


def with_gradients(function, trained, **options):
    """(loss, gradients) of a function, of the head too where it is trained."""
    if function is trainer:
        return functools.partial(trainer, trained=trained, **options)
    by = (0, 1) if trained else 0
    return jax.value_and_grad(functools.partial(function, **options), by, has_aux=True)


def trace(function, trained, shape=LARGE, masked=False, **options):
    models, *rest = arrays(shape, masked=masked)
    return jax.make_jaxpr(with_gradients(function, trained, **options))(*models, *rest).jaxpr


def products(jaxpr, turns=()):
    turns = iter(turns)
    found = operations(jaxpr, turns) / (2 * math.prod(LARGE))
    assert next(turns, None) is None, "every loop was met"
    return found


def turns_for(rows, sizes=None):
    """How often the loops over whole and over small chunks go round for so many tokens of the large batch."""
    size, small = sizes or chunk_sizes(LARGE[0], None)
    return rows // size, -(-(rows % size) // small)


@jax.jit
def computed_rows(mask):
    """What the counter says that a run with this mask computes; neither width nor vocabulary matters."""
    hidden, head = jnp.ones((mask.size, 1), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16)
    operands = Operands(hidden, head, hidden, head, jnp.zeros(mask.size, jnp.int32), mask)
    return dispatch.score(dispatch.Options(Settings(0.5)), operands).computed


# Work


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("function", "trained", "options", "most"),
    [
        (loss, True, {}, 4.01),
        (loss, False, {}, 3.01),
        (loss, True, {"ceiling": 0.3}, 4.01),
        (loss, True, {"quantile": 0.95}, 4.01),
        (loss, False, {"quantile": 0.95}, 3.01),
        (trainer, True, {}, 4.01),
        (trainer, False, {}, 3.01),
        (summed("divergence"), False, {}, 3.01),
        (summed("divergence"), True, {}, 6.01),
        (summed("clipped_divergence", "student_logp"), True, {"quantile": 0.95}, 6.01),
        (summed("divergence"), True, {"vocab_block": 4608}, 8.01),
        (summed("divergence"), False, {"vocab_block": 4608}, 7.01),
    ],
)
def test_no_more_products_are_formed_than_promised(function, trained, options, most, alpha):
    jaxpr = trace(function, trained, alpha=alpha, **options)
    # A quantile's clipped tokens come on top; their loops go round as often as there are tokens for.
    assert products(jaxpr, turns=(0, 0) if trained and "quantile" in options and function is loss else ()) <= most


def test_the_counter_finds_the_products_of_the_plain_form():
    function, _, options = NAIVE
    assert products(trace(function, True, **options)) == 4
    assert products(trace(function, False, **options)) == 3


def test_the_low_memory_loss_takes_no_more_products_than_a_sum_of_per_token_scores():
    for function in (loss, trainer):
        assert products(trace(function, True, alpha=0.5, vocab_block=4608)) <= 8.01
        assert products(trace(function, False, alpha=0.5, vocab_block=4608)) <= 7.01


def test_log_probs_alone_take_fewer_products():
    assert products(trace(logprob, False, alpha=None)) == pytest.approx(2)
    assert products(trace(logprob, True, alpha=None)) == pytest.approx(4)
    models, targets, weights, mask = arrays(LARGE)
    forward = jax.make_jaxpr(lambda *all_: logprob(*all_, alpha=None))(*models, targets, weights, mask)
    assert products(forward.jaxpr) == pytest.approx(1)


def test_a_quantile_costs_the_products_of_the_clipped_tokens_alone():
    tokens = LARGE[0]
    divergence = jnp.asarray(np.random.default_rng(0).exponential(size=tokens), jnp.float32)
    above = divergence > gradients.find_ceiling(divergence, None, None, 0.95)
    clipped = int(computed_rows(above))
    assert tokens / 20 <= above.sum() <= clipped <= tokens / 20 + 128
    for function in (loss, trainer):
        jaxpr = trace(function, True, alpha=0.5, quantile=0.95)
        assert products(jaxpr, turns=(0, 0)) <= 4.01
        total = products(jaxpr, turns=turns_for(clipped))
        assert total <= 4.2
        assert total - products(jaxpr, turns=(0, 0)) == pytest.approx(3 * clipped / tokens)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_the_tokens_are_half_the_work(seed):
    tokens, mask = LARGE[0], jnp.asarray(np.random.default_rng(seed).random(LARGE[0]) < 0.5)
    assert computed_rows(jnp.ones(tokens, bool)) == tokens and computed_rows(jnp.zeros(tokens, bool)) == 0
    rows, valid = int(computed_rows(mask)), int(mask.sum())
    assert valid <= rows <= min(0.55 * tokens, valid + 127)
    jaxpr = trace(loss, True, masked=True, alpha=0.5)
    assert products(jaxpr, turns=turns_for(valid)) == pytest.approx(4 * rows / tokens)
    assert products(jaxpr, turns=turns_for(tokens)) == pytest.approx(4)
    # Where the vocabulary comes in blocks the chunks are of 2048 and 256 tokens.
    blocked = turns_for(valid, (2048, 256))
    per_token = trace(summed("divergence"), True, masked=True, alpha=0.5)
    assert products(per_token, turns=turns_for(valid) + 2 * blocked) <= 0.55 * 6
    low_memory = trace(summed("divergence"), True, masked=True, alpha=0.5, vocab_block=4608)
    assert products(low_memory, turns=2 * blocked) <= 0.55 * 8


# Memory

MODES = {
    "loss": (loss, True, {"alpha": 0.5}),
    "loss, frozen head": (loss, False, {"alpha": 1.0}),
    "loss, quantile, mask": (loss, True, {"alpha": 0.0, "quantile": 0.95, "masked": True}),
    "trainer": (trainer, True, {"alpha": 0.5, "ceiling": 0.3}),
    "per token": (summed("divergence"), True, {"alpha": 0.5, "masked": True}),
    "per token, frozen head": (summed("divergence", "student_entropy"), False, {"alpha": 0.5}),
    "loss, low memory": (loss, True, {"alpha": 0.5, "vocab_block": 512}),
    "per token, low memory": (summed("divergence", "student_logp"), True, {"alpha": 0.5, "vocab_block": 512}),
    "log-probs": (logprob, True, {"alpha": None}),
}
NAIVE = (loss, True, {"alpha": 0.5, "implementation": "reference"})


def has_whole_logits(text, shape=MEDIUM):
    tokens, _, vocab = shape
    return re.search(rf"\[{tokens},{vocab}\]|\[{vocab},{tokens}\]", text) is not None


@functools.cache
def compiled(name):
    """(optimised program, bytes of its temporary memory) for this machine's CPU."""
    function, trained, options = NAIVE if name == "naive" else MODES[name]
    options = dict(options)
    models, *rest = arrays(MEDIUM, jnp.float32, options.pop("masked", False))
    program = jax.jit(with_gradients(function, trained, **options)).lower(*models, *rest).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", MODES)
def test_no_array_of_tokens_by_vocabulary_is_formed(name):
    function, trained, options = MODES[name]
    assert max(sizes(trace(function, trained, **options))) < LARGE[0] * LARGE[2]
    assert not has_whole_logits(compiled(name)[0])


def test_the_plain_form_has_one_so_that_the_test_above_can_fail():
    function, trained, options = NAIVE
    assert max(sizes(trace(function, trained, **options))) >= LARGE[0] * LARGE[2]
    assert has_whole_logits(compiled("naive")[0])


@pytest.mark.parametrize(
    ("name", "times"),
    [(name, 100 if "low memory" in name else 7) for name in MODES],
)
def test_far_less_memory_is_needed_than_for_the_plain_form(name, times):
    ratio = compiled("naive")[1] / compiled(name)[1]
    print(f"{name}: {ratio:.1f} times less than the plain form")
    assert ratio >= times
