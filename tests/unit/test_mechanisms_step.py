"""All mechanisms in the train step: every combination, whatever the split; only needed passes; budgets; dropout."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from unisd_jax.losses import Agreement, Objective, agreement_weights, masked_mean
from unisd_jax.models import (
    Dropout,
    HeadOptions,
    completion_hidden,
    completion_scores,
    head_logits,
    sampled_token_scores,
)
from unisd_jax.models import head as models_head
from unisd_jax.random import purpose_key
from unisd_jax.step import StepSettings, init_state, loss_and_gradients, student_scores, train_step
from unisd_jax.teacher import scoring
from unisd_jax.teacher.scoring import Budget, ContextScoring, Network, context_disagreement, passes_saved
from unisd_jax.types import Contexts, Prompts

MECHANISMS = ("ema", "agreement", "contrast", "matching", "clip")
SUBSETS = [on for count in range(6) for on in itertools.combinations(MECHANISMS, count)]
OPTIMIZER = optax.sgd(0.25)
TEMPERATURE = 0.7
# Prompt lengths, all different, so that a pass can be told by its shape.
STUDENT, TEACHER, NEGATIVE, CONTEXT = 6, 9, 8, 7

STAR = Objective(
    temperature=TEMPERATURE,
    clip_quantile=0.83,
    top_entropy=0.77,
    agreement=Agreement(),
    contrast_weight=0.1,
    matching_weight=0.1,
    importance="sequence",
)


@functools.cache
def toy():
    """One layer: what is tested here is the same in every layer."""
    return toys.random_model(num_layers=1)


@functools.cache
def adapters():
    """(student's, teacher's), both away from their start."""
    return tuple(toys.random_lora(toy()[1], seed) for seed in (0, 1))


@functools.cache
def all_views(*, batch=8, completion=5, number=3):
    """A ragged batch with every view there is."""
    views = toys.random_views(batch=batch, student=STUDENT, teacher=TEACHER, completion=completion)
    rng = np.random.default_rng(7)
    flat = toys.left_padded(rng, batch * number, CONTEXT)
    contexts = Contexts(*(x.reshape(batch, number, -1) for x in flat))
    return jax.tree.map(jnp.asarray, views._replace(contexts=contexts, negative=toys.left_padded(rng, batch, NEGATIVE)))


def switched(on, **changes):
    """The settings with these mechanisms."""
    options = Objective(
        temperature=TEMPERATURE,
        clip_ceiling=3.0 if "clip" in on else None,
        agreement=Agreement() if "agreement" in on else None,
        contrast_weight=0.1 if "contrast" in on else 0.0,
        matching_weight=0.1 if "matching" in on else 0.0,
    )
    return StepSettings(options, ema_decay=0.9 if "ema" in on else None, **changes)


def gradients(settings, views=None, *, step=0, compiled=False):
    """(gradients, metrics) at the student's adapter.

    Operation by operation unless `compiled`: these are many programs of one shape, each run once.
    """
    model, base = toy()

    def call(student, lora, views, step):
        teacher = Network(model, base, lora)
        return loss_and_gradients(student, teacher, base, views, settings=settings, step=step)

    arguments = (*adapters(), all_views() if views is None else views, step)
    if compiled:
        return jax.jit(call)(*arguments)
    with jax.disable_jit():
        return call(*arguments)


def assert_same(found, expected, *, rel=1e-4):
    (tree, metrics), (expected_tree, expected_metrics) = found, expected
    toys.assert_trees_close(tree, expected_tree, atol=2e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=rel, abs=1e-6), name


# --- Every combination ---

REPORTED = {
    "ema": {"teacher_distance", "teacher_motion", "ema_truncation"},
    "agreement": {
        "agreement_weight",
        "agreement_weight_min",
        "agreement_effective_share",
        "agreement_above_99",
        "agreement_disagreement",
    },
    "contrast": {"contrast_active_share", "contrast_positive_distance", "contrast_negative_distance"},
    "matching": set(),
    "clip": {"clip_share", "clip_ceiling"},
}
ALWAYS = {
    "loss",
    "gradient_norm",
    "entropy",
    "divergence",
    "sampler_gap",
    "sampler_gap_max",
}


@pytest.mark.parametrize("on", SUBSETS, ids=lambda on: "+".join(on) or "none")
def test_every_combination_of_mechanisms_takes_a_step(on):
    model, base = toy()
    settings, student = switched(on), adapters()[0]
    # The adapter is not the base, but it is its own EMA: a teacher with another prompt.
    state = init_state(student, OPTIMIZER, settings)
    step = functools.partial(train_step, model=model, optimizer=OPTIMIZER, settings=settings)
    with jax.disable_jit():
        after, metrics = step(state, base, all_views())
    metrics = {name: float(value) for name, value in metrics.items()}
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert int(after.step) == 1 and metrics["gradient_norm"] > 1e-3
    for new, old in zip(jax.tree.leaves(after.student), jax.tree.leaves(student), strict=True):
        assert np.any(new != old)
    assert (after.teacher is None) == ("ema" not in on)
    if "ema" in on:
        assert metrics["teacher_motion"] > 0

    terms = {"divergence", *({"contrast", "matching"} & set(on))}
    expected = ALWAYS.union(*(REPORTED[name] for name in on))
    expected |= {f"{kind}_{term}" for term in terms for kind in ("loss", "loss_share", "gradient_share")}
    assert set(metrics) == expected
    assert metrics["loss"] == pytest.approx(sum(metrics[f"loss_{term}"] for term in terms), rel=1e-5)
    for kind in ("loss_share", "gradient_share"):
        shares = [metrics[f"{kind}_{term}"] for term in terms]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5) and min(shares) >= 0
    if "clip" in on:
        assert 0 < metrics["clip_share"] < 1 and metrics["clip_ceiling"] == pytest.approx(3.0)
    if "agreement" in on:
        assert 0 < metrics["agreement_weight_min"] < metrics["agreement_weight"] < 1


def test_each_mechanism_changes_what_the_student_learns():
    """Against the run without any: another gradient."""
    plain, _ = gradients(switched(()))
    for on in ("agreement", "contrast", "matching", "clip"):
        found, _ = gradients(switched((on,)))
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, found, plain))
        assert float(difference) > 1e-3 * float(optax.tree.norm(plain)), on


# --- Splitting the batch ---


@pytest.mark.parametrize(("dropout", "splits"), [(0.0, (4,)), (0.3, (2,))])
def test_micro_batches_change_nothing_with_everything_on(dropout, splits):
    """Five mechanisms, a quantile clip, the entropy mask and importance weights; dropout is drawn per row."""
    views = near_the_policy(all_views())
    expected = gradients(StepSettings(STAR, dropout=dropout), views, compiled=True)
    metrics = expected[1]
    assert 0 < float(metrics["clip_share"]) < 1 and 0 < float(metrics["entropy_mask_share"]) < 1
    assert {"loss_contrast", "loss_matching", "agreement_weight"} <= metrics.keys()
    for micro_batches in splits:
        settings = StepSettings(STAR, micro_batches, dropout=dropout)
        assert_same(gradients(settings, views, compiled=True), expected)


@functools.cache
def exact_logps():
    """The student's own log-probs of the completions, without dropout."""
    model, base = toy()
    views = all_views()
    scores = functools.partial(completion_scores, model, temperature=TEMPERATURE)
    return jax.jit(scores)(base, adapters()[0], views.student, views.completions).logp


def near_the_policy(views):
    """Sampled by slightly other weights: importance weights around 1."""
    noise = np.random.default_rng(5).normal(0, 0.2, exact_logps().shape).astype(np.float32)
    return views._replace(sampler_logps=exact_logps() + noise)


# --- The auxiliary views ---

TOKEN, SEQUENCE = Objective(agreement=Agreement()), Objective(agreement=Agreement("sequence"))


def disagreement(options, scoring_settings, views=None, entropy=None, *, compiled=False):
    """What the teacher's views disagree by; operation by operation unless `compiled`."""
    return scored_disagreement(options, scoring_settings, views, entropy, compiled=compiled)[0]


def scored_disagreement(options, scoring_settings, views=None, entropy=None, *, compiled=False):
    """The same, and which tokens a budget by entropy has scored."""
    model, base = toy()

    def call(views, entropy):
        return context_disagreement(
            Network(model, base, adapters()[1]), views, views.completions.mask, settings=options,
            scoring=scoring_settings, student_entropy=entropy,
        )  # fmt: skip

    views = all_views() if views is None else views
    if compiled:
        return jax.device_get(jax.jit(call)(views, entropy))
    with jax.disable_jit():
        return jax.device_get(call(views, entropy))


@functools.cache
def full(level, number=3):
    """All views, one by one."""
    views = all_views()
    contexts = jax.tree.map(lambda x: x[:, :number], views.contexts)
    return disagreement(TOKEN if level == "token" else SEQUENCE, ContextScoring(), views._replace(contexts=contexts))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_how_many_views_go_at_a_time_changes_nothing(level):
    options = TOKEN if level == "token" else SEQUENCE
    for scoring_settings in (ContextScoring(3), ContextScoring(3, 2)):
        found = disagreement(options, scoring_settings, compiled=True)
        np.testing.assert_allclose(found, full(level), rtol=1e-4, atol=1e-6)
    assert np.all(full(level)[np.asarray(all_views().completions.mask) if level == "token" else slice(None)] > 0)


def test_the_disagreement_by_its_definition():
    """Unbiased variance over the views of the log-prob of each token, at temperature 1."""
    model, base = toy()
    views = all_views()
    scores = jax.jit(functools.partial(completion_scores, model))
    logps = [
        scores(
            base, adapters()[1], Prompts(views.contexts.ids[:, k], views.contexts.mask[:, k]), views.completions
        ).logp
        for k in range(3)
    ]
    expected = np.where(views.completions.mask, np.var(np.stack(logps), axis=0, ddof=1), 0.0)
    np.testing.assert_allclose(full("token"), expected, rtol=1e-3, atol=1e-5)


def test_more_padding_before_the_contexts_changes_nothing():
    views = all_views()
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (4, 0))), views.contexts)
    found = disagreement(TOKEN, ContextScoring(), views._replace(contexts=wider))
    np.testing.assert_allclose(found, full("token"), rtol=1e-4, atol=1e-6)


def test_contexts_that_are_missing_are_named():
    with pytest.raises(ValueError, match="need auxiliary views, which the batch does not have"):
        disagreement(TOKEN, ContextScoring(), all_views()._replace(contexts=None))
    with pytest.raises(ValueError, match="need the negative view, which the batch does not have"):
        gradients(switched(("contrast",)), all_views()._replace(negative=None))
    with pytest.raises(ValueError, match="need the teacher view, which the batch does not have"):
        gradients(switched(()), all_views()._replace(teacher=None))


# --- Only what is needed is run ---


@pytest.fixture
def passes(monkeypatch):
    """Records, while a step is traced, the width of the prompts of each teacher pass and each call of its head."""
    found = {"bodies": [], "heads": 0}
    hidden = Network.hidden

    def counted_hidden(self, prompts, completions):
        found["bodies"].append(prompts.ids.shape[-1])
        return hidden(self, prompts, completions)

    def counted_scores(*args, **options):
        found["heads"] += 1
        return sampled_token_scores(*args, **options)

    monkeypatch.setattr(Network, "hidden", counted_hidden)
    monkeypatch.setattr(scoring, "sampled_token_scores", counted_scores)
    return found


def trace(settings):
    model, base = toy()
    student, teacher = adapters()

    def call(student, views):
        return loss_and_gradients(student, Network(model, base, teacher), base, views, settings=settings)

    return jax.make_jaxpr(call)(student, all_views())


@pytest.mark.parametrize(
    ("settings", "bodies", "heads"),
    [
        (switched(()), [TEACHER], 0),
        (switched(("clip",)), [TEACHER], 0),
        (switched(("matching",)), [TEACHER], 0),
        (switched(("contrast",)), [TEACHER, NEGATIVE], 2),
        (switched(("agreement",)), [TEACHER, CONTEXT], 1),
        (switched(MECHANISMS[1:]), [TEACHER, NEGATIVE, CONTEXT], 3),
        (StepSettings(Objective("none", matching_weight=1.0)), [TEACHER], 0),
        (StepSettings(Objective("none", contrast_weight=1.0)), [TEACHER, NEGATIVE], 2),
        (StepSettings(Objective("nll")), [], 0),
    ],
    ids=["plain", "clip", "match_joint", "contrast", "agreement", "all", "match_repr", "contrast alone", "nll"],
)
def test_only_the_needed_teacher_passes_are_run(passes, settings, bodies, heads):
    trace(settings)
    assert sorted(passes["bodies"]) == sorted(bodies) and passes["heads"] == heads


@pytest.mark.parametrize(
    ("objective", "taught", "jacobians"),
    [
        (Objective("none", matching_weight=1.0), False, ()),
        (Objective("nll"), False, ("student_logp",)),
        (Objective(), True, ("divergence",)),
        (Objective(contrast_weight=1.0), True, ("divergence", "student_logp")),
    ],
    ids=["matching", "nll", "divergence", "contrast"],
)
def test_only_the_needed_products_with_the_head_are_made(monkeypatch, objective, taught, jacobians):
    """Neither the teacher's distribution nor a jacobian of the student's scores that no term asks for."""
    seen = []

    def scores_with_jacobians(*arrays, **options):
        seen.append((arrays[2] is not None, options["jacobians"]))
        return models_head.scores_with_jacobians(*arrays, **options)

    monkeypatch.setattr("unisd_jax.head_pass.scores_with_jacobians", scores_with_jacobians)
    trace(StepSettings(objective))
    assert seen == [(taught, jacobians)]


def test_computing_layers_again_changes_the_memory_and_not_the_gradients():
    model, params = toys.random_model(num_layers=4)
    views, settings = toys.random_views(batch=8, student=60, teacher=9, completion=40), StepSettings(Objective())
    student = toys.random_lora(params)

    def run(model):
        def gradients(student, views):
            teacher = Network(model, params, None)
            return loss_and_gradients(student, teacher, params, views, settings=settings)[0]

        compiled = jax.jit(gradients).lower(student, views).compile()
        return compiled(student, views), compiled.memory_analysis().temp_size_in_bytes

    (kept, much), (again, little) = run(model), run(dataclasses.replace(model, remat="layer"))
    toys.assert_trees_close(again, kept, atol=1e-6)
    assert little < 0.7 * much


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "objective",
    [STAR, Objective("nll"), dataclasses.replace(STAR, top_entropy=0.5), Objective(alpha=0.5, entry_ceiling=0.1)],
    ids=["star", "nll", "entropy mask", "entry ceiling"],
)
def test_no_step_holds_the_logits_of_more_than_a_chunk(kind, objective):
    model, params = toys.random_model()
    chunk = 4
    model = dataclasses.replace(model, head_options=HeadOptions(chunk_size=chunk))
    views = all_views()
    tokens, vocab = views.completions.ids.size, model.config.vocab_size
    settings = StepSettings(objective)
    student = toys.random_lora(params, targets=("q",)) if kind == "lora" else params
    step = functools.partial(train_step, model=model, optimizer=optax.sgd(0.1), settings=settings)
    found = shapes(jax.make_jaxpr(step)(init_state(student, optax.sgd(0.1), settings), params, views).jaxpr)
    largest = max(math.prod(shape) // vocab for shape in found if shape[-1:] == (vocab,))
    assert largest <= chunk < tokens


def shapes(jaxpr):
    """The shapes of all values in a program, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@functools.cache
def long_views(number):
    """More tokens than one chunk of the head takes."""
    return all_views(batch=8, completion=40, number=number)


def test_auxiliary_views_never_hold_the_vocabulary_for_all_tokens():
    vocabulary = 61
    model, base = toys.random_model(num_layers=1, vocab_size=vocabulary)
    views = long_views(2)
    tokens = views.completions.mask.size
    assert tokens > 256

    def score(views, per_pass):
        mask = views.completions.mask
        return context_disagreement(
            Network(model, base, None), views, mask, settings=TOKEN, scoring=ContextScoring(per_pass)
        )

    def whole(views):
        return head_logits(completion_hidden(model, base, None, views.student, views.completions), model.head(base))

    def large(program):
        return [
            shape
            for shape in shapes(program.jaxpr)
            if vocabulary in shape and np.prod(shape) >= tokens * vocabulary
        ]  # fmt: skip

    for per_pass in (1, 2):
        program = jax.make_jaxpr(functools.partial(score, per_pass=per_pass))(views)
        assert any(vocabulary in shape for shape in shapes(program.jaxpr)), "its chunks are seen"
        assert large(program) == []
    assert large(jax.make_jaxpr(whole)(views)), "what the search would find"


def test_memory_does_not_grow_with_the_number_of_views():
    model, base = toy()

    def temporary(number, per_pass=1):
        def score(views):
            mask = views.completions.mask
            return context_disagreement(
                Network(model, base, None), views, mask, settings=TOKEN, scoring=ContextScoring(per_pass)
            )

        views = long_views(number)
        return jax.jit(score).lower(views).compile().memory_analysis().temp_size_in_bytes

    two, eight = temporary(2), temporary(8)
    assert 0 < eight < 1.1 * two
    assert temporary(8, per_pass=8) > 1.5 * two, "what all at once would take"


# --- Budgets ---


@functools.cache
def student_entropy():
    """A made-up signal with a clear order of rows and tokens."""
    return jnp.asarray(np.random.default_rng(3).exponential(1.0, all_views().completions.mask.shape), jnp.float32)


def weights_of(found, scored, options):
    scored = None if scored is None else jnp.asarray(scored)
    mask = all_views().completions.mask
    return np.asarray(agreement_weights(jnp.asarray(found), mask, settings=options.agreement, scored=scored))


def row_means(values):
    mask = np.asarray(all_views().completions.mask)
    return np.where(mask, values, 0).sum(axis=1) / mask.sum(axis=1)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("signal", ["entropy", "spread"])
def test_a_budget_of_examples_scores_those_with_the_largest_signal(level, signal):
    options = TOKEN if level == "token" else SEQUENCE
    budget = ContextScoring(budget=Budget(0.5, "example", signal))
    found, scored = scored_disagreement(options, budget, entropy=student_entropy())
    two = full(level, 2)
    order = student_entropy() if signal == "entropy" else two
    largest = np.argsort(row_means(order) if order.ndim == 2 else order)[-4:]
    chosen = np.isin(np.arange(8), largest)
    np.testing.assert_allclose(found[chosen], full(level)[chosen], rtol=1e-4, atol=1e-6)
    if signal == "entropy":
        assert not found[~chosen].any()
        np.testing.assert_array_equal(scored, np.broadcast_to(chosen[:, None], scored.shape))
        weights = weights_of(found, scored, options)
        assert np.all(weights[~chosen] == 1) and np.any(weights[chosen] < 1)
    else:
        assert scored is None
        np.testing.assert_allclose(found[~chosen], two[~chosen], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("signal", ["entropy", "spread"])
def test_a_budget_of_tokens_scores_those_with_the_largest_signal(signal):
    mask = np.asarray(all_views().completions.mask)
    budget = ContextScoring(budget=Budget(0.25, "token", signal))
    found, scored = scored_disagreement(TOKEN, budget, entropy=student_entropy())
    two = full("token", 2)
    order = np.where(mask, student_entropy() if signal == "entropy" else two, -np.inf)
    # A share of the tokens that there are: padding is neither scored nor counted.
    kept = math.ceil(0.25 * mask.sum())
    chosen = order >= np.sort(order, axis=None)[-kept]
    assert chosen.sum() == kept < mask.size / 4 and mask[chosen].all()
    assert scored is None if signal == "spread" else np.array_equal(scored, chosen)
    np.testing.assert_allclose(found[chosen], full("token")[chosen], rtol=1e-4, atol=1e-6)
    expected = np.zeros_like(two) if signal == "entropy" else two
    np.testing.assert_allclose(found[~chosen], expected[~chosen], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("unit", "share"), [("example", 0.125), ("token", 0.05), ("token", 0.2)])
def test_what_is_scored_is_measured_by_what_is_scored(unit, share):
    """Were the others part of the quantile, it would fall to their 0 and every scored token to the smallest weight."""
    budget = ContextScoring(budget=Budget(share, unit))
    found, scored = scored_disagreement(TOKEN, budget, entropy=student_entropy())
    mask, agreement = np.asarray(all_views().completions.mask), TOKEN.agreement
    weights, smallest = weights_of(found, scored, TOKEN), 1 / (1 + agreement.gamma * agreement.cap)
    scale = np.quantile(found[scored & mask], agreement.quantile)
    expected = 1 / (1 + agreement.gamma * np.minimum(found / scale, agreement.cap))
    np.testing.assert_allclose(weights[scored & mask], expected[scored & mask], rtol=1e-4)
    assert weights[scored & mask].max() > 2 * smallest and np.all(weights[~scored] == 1)


@pytest.mark.parametrize("unit", ["example", "token"])
@pytest.mark.parametrize("signal", ["entropy", "spread"])
def test_a_budget_that_holds_everything_changes_nothing(unit, signal):
    found = disagreement(TOKEN, ContextScoring(budget=Budget(1.0, unit, signal)), entropy=student_entropy())
    np.testing.assert_allclose(found, full("token"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("unit", "signal"), [("example", "entropy"), ("token", "spread")])
def test_a_budget_does_not_depend_on_micro_batches(unit, signal):
    budget = Budget(0.5, unit, signal)
    one, two = (
        disagreement(TOKEN, ContextScoring(1, parts, budget), entropy=student_entropy(), compiled=True)
        for parts in (1, 2)
    )
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_a_budget_by_entropy_needs_the_entropy():
    with pytest.raises(ValueError, match="the student's entropy, which was not given"):
        disagreement(TOKEN, ContextScoring(budget=Budget(0.5)))


@pytest.mark.parametrize(
    ("scoring_settings", "bodies", "heads"),
    [
        (ContextScoring(budget=Budget(0.5)), 0.5, 0.5),
        (ContextScoring(budget=Budget(0.5, signal="spread")), 0.5 / 3, 0.5 / 3),
        (ContextScoring(budget=Budget(0.3)), 5 / 8, 5 / 8),  # three of eight rows
        (ContextScoring(micro_batches=2, budget=Budget(0.3)), 0.5, 0.5),  # four, to be split in two
        (ContextScoring(budget=Budget(0.25, "token")), 0.0, 0.75),
        (ContextScoring(budget=Budget(0.25, "token", "spread")), 0.0, 0.25),
        (ContextScoring(budget=Budget(1.0)), 0.0, 0.0),
        (ContextScoring(budget=Budget(1e-9)), 7 / 8, 7 / 8),  # never nothing at all
    ],
)
def test_what_a_budget_saves(scoring_settings, bodies, heads):
    saved = passes_saved(scoring_settings, batch=8, tokens=5, views=3)
    assert saved == {
        "agreement_passes_saved": pytest.approx(bodies, abs=1e-9),
        "agreement_head_saved": pytest.approx(heads, abs=1e-9),
    }


def test_a_budget_pays_for_the_pass_of_its_signal():
    saved = passes_saved(ContextScoring(budget=Budget(0.5)), batch=8, tokens=5, views=2, extra_passes=1)
    assert saved == {"agreement_passes_saved": pytest.approx(0.0), "agreement_head_saved": pytest.approx(0.0)}


def test_without_a_budget_nothing_is_said_to_be_saved():
    assert passes_saved(ContextScoring(), batch=8, tokens=5, views=3) == {}


@pytest.mark.parametrize(("unit", "signal"), [("example", "entropy"), ("token", "spread")])
def test_the_audit_measures_what_a_budget_gets_wrong(unit, signal):
    settings = switched(("agreement",), budget=Budget(0.5, unit, signal))
    _, metrics = gradients(dataclasses.replace(settings, audit=True))
    model, base = toy()
    views, mask = all_views(), all_views().completions.mask
    student, teacher = adapters()
    network, taught = Network(model, base, teacher), scoring.TeacherScores()
    with jax.disable_jit():
        entropy = student_scores(student, network, base, views, taught, settings).entropy
    budget = ContextScoring(budget=settings.budget)
    found, scored = scored_disagreement(settings.objective, budget, entropy=entropy)
    pair = weights_of(found, scored, settings.objective), weights_of(full("token"), None, settings.objective)
    weights = [jnp.asarray(values) for values in pair]
    error = float(masked_mean(jnp.abs(weights[0] - weights[1]), mask))
    assert error > 1e-3
    assert float(metrics["agreement_weight_error"]) == pytest.approx(error, rel=1e-3)
    assert float(metrics["agreement_weight"]) == pytest.approx(float(masked_mean(weights[0], mask)), rel=1e-4)
    # Nothing but the budget needs the student's entropy beforehand: a pass of its own.
    saved = passes_saved(budget, batch=8, tokens=5, views=3, extra_passes=int(signal == "entropy"))
    assert {name: float(metrics[name]) for name in saved} == pytest.approx(saved)
    # An ordinary step learns the same and does not pay for the audit.
    tree, plain = gradients(settings)
    assert set(metrics) - set(plain) == {"agreement_weight_error"}
    assert float(plain["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)


# --- Dropout ---


def hidden_with(dropout, rows=slice(None)):
    model, base = toy()
    views = all_views()
    prompts, completions = (jax.tree.map(lambda x: x[rows], part) for part in (views.student, views.completions))
    with jax.disable_jit():
        return np.asarray(completion_hidden(model, base, adapters()[0], prompts, completions, dropout))


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), 8)


def test_dropout_at_rate_zero_changes_nothing():
    np.testing.assert_array_equal(hidden_with(Dropout(0.0, keys())), hidden_with(None))


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    dropout = Dropout(0.25, keys())
    x = jnp.ones((8, 50, 40))
    found = np.asarray(dropout.apply(x))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert len({row.tobytes() for row in found}) == 8, "each row has its own draws"
    assert not np.array_equal(found, np.asarray(dropout.at(1).apply(x))), "and so has each adapter"


def test_a_rows_draws_do_not_depend_on_its_neighbours():
    whole = hidden_with(Dropout(0.4, keys()))
    np.testing.assert_allclose(hidden_with(Dropout(0.4, keys()[2:5]), slice(2, 5)), whole[2:5], atol=1e-5)
    assert np.abs(whole - hidden_with(None)).max() > 0.1


def test_dropout_acts_on_the_gradient_pass_and_nowhere_else():
    """At 0.5 every score of the teacher, and the gap to the sampler, is as without it; the gradient is another."""
    views = all_views()._replace(sampler_logps=exact_logps())
    on = ("agreement", "contrast")
    (tree, metrics), (plain_tree, plain) = (gradients(switched(on, dropout=rate), views) for rate in (0.5, 0.0))
    assert float(metrics["sampler_gap"]) < 1e-5 and float(metrics["sampler_gap_max"]) < 1e-4
    for name in metrics:
        if name.startswith("agreement_"):
            assert float(metrics[name]) == pytest.approx(float(plain[name]), rel=1e-5), name
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, tree, plain_tree))
    assert float(difference) > 0.05 * float(optax.tree.norm(plain_tree))
    assert float(metrics["divergence"]) != pytest.approx(float(plain["divergence"]), rel=1e-3)


def test_dropout_is_drawn_anew_by_seed_and_step_alone():
    views = all_views()._replace(sampler_logps=None)
    settings = switched((), dropout=0.3)
    first, again = (gradients(settings, views, step=2) for _ in range(2))
    toys.assert_trees_close(first[0], again[0])
    losses = {
        float(gradients(dataclasses.replace(settings, seed=seed), views, step=step)[1]["loss"])
        for seed, step in ((0, 2), (0, 3), (1, 2))
    }
    assert float(first[1]["loss"]) in losses and len(losses) == 3
    key = functools.partial(purpose_key, purpose="dropout")
    assert len({jax.random.key_data(key(*pair)).tobytes() for pair in ((0, 2), (0, 3), (1, 2))}) == 3


def test_full_weights_have_no_adapters_to_drop():
    model, base = toy()
    other = jax.tree.map(lambda x: 0.9 * x, base)
    views = all_views()._replace(sampler_logps=None)

    def loss(rate):
        settings, teacher = switched((), dropout=rate), Network(model, base, None)
        with jax.disable_jit():
            return float(loss_and_gradients(other, teacher, base, views, settings=settings)[1]["loss"])

    assert loss(0.5) == loss(0.0) > 0
