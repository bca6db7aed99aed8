"""Tokens, vocabulary or both divided over eight devices: the same numbers, and nothing large on the wire."""

import re

import jax
import jax.numpy as jnp
import kernel_oracle as oracle
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kernel_oracle import DIFFERENTIABLE, Case, Oracle, error_of_maximum

from unisd_jax.kernels import Layout, fused_linear_logprob

AXES = ("data", "fsdp", "tensor")
DIVISIONS = {
    "tokens": (AXES, ()),
    "vocabulary": ((), ("fsdp", "tensor")),
    "both": (("data", "fsdp"), ("tensor",)),
}
TOKENS, WIDTH, VOCAB = 37, 16, 101  # neither can be divided evenly
CHUNKS = {"chunk_size": 4}
LOW_MEMORY = {"chunk_size": 4, "vocab_block": 20}


def layout(division):
    tokens, vocab = DIVISIONS[division]
    return Layout(jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3), tokens, vocab)


def unequal_mask():
    """All tokens of the first devices, one in the middle, none at the end."""
    places = np.arange(TOKENS)
    return jnp.asarray((places < 12) | (places == 20))


def assert_same(scores, gradients, expected, right):
    for name, values in expected.scores.items():
        np.testing.assert_allclose(getattr(scores, name), values, rtol=2e-6, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(scores.clipped, expected.clipped)
    for gradient, value in zip(gradients, right, strict=True):
        assert error_of_maximum(gradient, value) <= 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("division", "options"),
    [("tokens", CHUNKS), ("vocabulary", CHUNKS), ("both", CHUNKS), ("both", LOW_MEMORY)],
    ids=["tokens", "vocabulary", "both", "both, low memory"],
)
def test_the_loss_and_its_gradients_are_those_of_one_device(division, options, masked):
    case, (weights,) = oracle.random_case(TOKENS, WIDTH, VOCAB), oracle.random_weights(TOKENS).values()
    mask = unequal_mask() if masked else jnp.ones(TOKENS, bool)
    clip = {"alpha": 0.5, "quantile": 0.8}
    (loss, scores), gradients = oracle.loss_and_gradients(
        case, weights, mask, layout=layout(division), **clip, **options
    )
    expected = Oracle(case, mask=mask, **clip)
    assert expected.clipped.sum() > 2
    assert loss == pytest.approx(expected.loss(weights), rel=1e-5)
    assert_same(scores, gradients, expected, expected.gradients({"clipped_divergence": weights}))


@pytest.mark.parametrize(
    ("division", "alpha", "options"),
    [
        ("tokens", 0.5, CHUNKS),
        ("vocabulary", 0.0, CHUNKS),
        ("both", 1.0, CHUNKS | {"entry_ceiling": 0.2}),
        ("both", 0.5, LOW_MEMORY | {"vocab_size": 90, "soft_cap": 3.0}),
    ],
    ids=["tokens", "vocabulary", "both", "both, low memory"],
)
def test_the_scores_and_their_gradients_are_those_of_one_device(division, alpha, options):
    case = oracle.random_case(TOKENS, WIDTH, VOCAB, teacher_width=12)
    weights, mask = oracle.random_weights(TOKENS, names=DIFFERENTIABLE), unequal_mask()
    case = case._replace(targets=case.targets % options.get("vocab_size", VOCAB))
    case = case._replace(
        student_hidden=jnp.where(mask[:, None], case.student_hidden, jnp.nan),
        targets=jnp.where(mask, case.targets, -7),
    )
    options = {"alpha": alpha, "temperature": 0.7, "ceiling": jnp.float32(0.5)} | options
    scores, gradients = oracle.scores_and_gradients(case, weights, mask, layout=layout(division), **options)
    expected = Oracle(case, mask=mask, **options)
    assert_same(scores, gradients, expected, expected.gradients(weights))
    if "entry_ceiling" in options:
        np.testing.assert_array_equal(scores.entry_capped, expected.entry_capped)


def test_a_frozen_head_and_the_trainer_s_function_are_those_of_one_device():
    case, (weights,) = oracle.random_case(TOKENS, WIDTH, VOCAB), oracle.random_weights(TOKENS).values()
    options = {"alpha": 0.1, "quantile": 0.8, "mask": unequal_mask()}
    expected = Oracle(case, **options)
    right = expected.gradients({"clipped_divergence": weights})
    for trained in (False, True):
        (loss, scores), (hidden, head) = oracle.value_and_grad(
            case, weights, head_gradient=trained, layout=layout("both"), **options, **CHUNKS
        )
        assert loss == pytest.approx(expected.loss(weights), rel=1e-5)
        assert (head is not None) == trained
        assert_same(scores, (hidden, head) if trained else (hidden,), expected, right if trained else right[:1])


def test_log_probs_are_those_of_one_device():
    case, weights = oracle.random_case(TOKENS, WIDTH, VOCAB), oracle.random_weights(TOKENS, names=("student_logp",))
    case = case._replace(targets=case.targets.at[3].set(VOCAB))  # a column that only padding has
    weights["student_logp"] = weights["student_logp"].at[3].set(0.0)

    @jax.jit
    def run(hidden, head):
        def total(hidden, head):
            scores = fused_linear_logprob(hidden, head, case.targets, layout=layout("both"), **CHUNKS)
            return jnp.sum(weights["student_logp"] * scores.logp), scores

        return jax.grad(total, (0, 1), has_aux=True)(hidden, head)

    gradients, scores = run(*case[:2])
    expected = Oracle(case, alpha=0.5)
    np.testing.assert_allclose(scores.logp, expected.scores["student_logp"], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(scores.entropy, expected.scores["student_entropy"], rtol=2e-6, atol=2e-6)
    for gradient, right in zip(gradients, expected.gradients(weights), strict=True):
        assert error_of_maximum(gradient, right) <= 1e-5


# What is sent

SENT = re.compile(r"= (\(?\w+\[.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
EVEN = (96, 8, 264)  # tokens, width and vocabulary, so that every size says what it is of


def sent(text):
    """{(kind, shape): how often} of the collectives in a compiled program; those in a loop count once."""
    found = {}
    for types, kind in SENT.findall(text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", types):
            key = kind, tuple(int(size) for size in shape.split(",") if size)
            found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("function", ["loss", "scores"])
@pytest.mark.parametrize("division", DIVISIONS)
def test_only_numbers_per_token_hidden_states_and_the_head_s_gradient_are_sent(division, function):
    tokens, width, vocab = EVEN
    where = layout(division)
    rows, columns = (NamedSharding(where.mesh, PartitionSpec(axes)) for axes in (where.tokens, where.vocab))

    def array(shape, sharding, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    hidden, head = array((tokens, width), rows), array((vocab, width), columns)
    case = Case(hidden, head, hidden, head, array((tokens,), rows, jnp.int32))
    weights, mask = array((tokens,), rows), array((tokens,), rows, bool)
    options = {"alpha": 0.5, "chunk_size": 6, "layout": where}
    if function == "loss":
        lowered = oracle.loss_and_gradients.lower(case, weights, mask, quantile=0.9, **options)
    else:
        lowered = oracle.scores_and_gradients.lower(case, {"divergence": weights}, mask, **options)
    found = sent(lowered.compile().as_text())
    print(f"\n{division}, {function}:", *(f"{n} × {kind} {list(shape)}" for (kind, shape), n in found.items()))
    local_tokens, local_vocab = tokens // 2 ** len(where.tokens), vocab // 2 ** len(where.vocab)
    numbers = {(), (options["chunk_size"],), (tokens,), (local_tokens, width)}
    summed_heads = {("all-reduce", (local_vocab, width))} if where.tokens else set()
    assert found and {kind_shape for kind_shape in found if kind_shape[1] not in numbers} == summed_heads
