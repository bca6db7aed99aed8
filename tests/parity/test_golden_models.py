"""Forward passes, greedy tokens and training objectives that other implementations computed on tiny random models.

`data/llama31`, a checkpoint and its numbers, lies beside this file; other families need the folder of golden numbers.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from unisd_jax.losses import Objective
from unisd_jax.models import load_hf
from unisd_jax.rollout import JaxSampler, Sampling
from unisd_jax.step import StepSettings, init_state, train_step
from unisd_jax.types import Completions, Prompts, Views

DATA = Path(__file__).parent / "data"
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["llama31", "qwen25", "qwen25_untied", "gemma3", "internlm3"])
def golden(request):
    """(model, params, the numbers to match)."""
    if request.param == "llama31":
        folder, numbers = DATA / "llama31", DATA / "llama31" / "expected.npz"
    else:
        models = request.getfixturevalue("golden_dir") / "models"
        folder, numbers = models / request.param, models / f"{request.param}.npz"
    with np.load(numbers) as file:
        return *load_hf(folder), {name: file[name] for name in file.files}


def test_hidden_states_and_logits(golden):
    model, params, expected = golden
    ids, mask = expected["input_ids"].astype(np.int32), expected["attention_mask"].astype(bool)
    assert not mask[1:, 0].any() and mask[:, -1].all(), "rows are left-padded"
    hidden = jax.jit(model.hidden)(params, ids, mask)
    logits = model.logits(params, hidden)
    assert np.max(np.abs(hidden - expected["last_hidden"])[mask]) <= TOLERANCE
    assert np.max(np.abs(logits - expected["logits"])[mask]) <= TOLERANCE
    # A tolerance means something only beside the size of what it bounds.
    assert np.max(np.abs(expected["logits"][mask])) > 1


def test_greedy_tokens(golden):
    model, params, expected = golden
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    rollout = sampler.generate(
        expected["input_ids"].astype(np.int32),
        expected["attention_mask"].astype(bool),
        Sampling(expected["greedy"].shape[1], (), 0, temperature=0.0),
        key=jax.random.key(0),
        version=0,
    )
    np.testing.assert_array_equal(rollout.ids, expected["greedy"])


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("llama", "ema_forward_kl"),
        ("llama", "ema_reverse_kl"),
        ("llama", "ema_jsd_half"),
        ("llama", "ema_jsd_0p3_temp1"),
        ("qwen2", "ema_forward_kl"),
    ],
)
def test_the_objective_and_its_gradient(request, family, case):
    """One step of gradient descent at rate 1, so that the change of the weights is the gradient."""
    folder = DATA / "llama_loss" if family == "llama" else request.getfixturevalue("golden_dir") / "loss"
    expected = json.loads((folder / f"{family}.json").read_text())["cases"][case]
    with np.load(folder / f"{family}.npz") as file:
        batch = {name.removeprefix("batch/"): file[name] for name in file.files if name.startswith("batch/")}
        gradients = {name.rsplit("/", 1)[1]: file[name] for name in file.files if name.startswith(f"grad/{case}/")}
    model, student = load_hf(folder / f"{family}_student")
    _, teacher = load_hf(folder / f"{family}_teacher")

    def prompts(kind):
        return Prompts(batch[f"{kind}_ids"].astype(np.int32), batch[f"{kind}_mask"].astype(bool))

    completions = Completions(batch["completion_ids"].astype(np.int32), batch["completion_mask"].astype(bool))
    views = Views(prompts("prompt"), prompts("teacher_prompt"), completions, None)
    options = expected["config"]
    settings = StepSettings(Objective("divergence", options["alpha"], "upstream", options["temperature"]))
    optimizer = optax.sgd(1.0)
    step = functools.partial(train_step, model=model, optimizer=optimizer, settings=settings)
    step = jax.jit(step, compiler_options=toys.QUICK)
    state, metrics = step(init_state(student, optimizer, settings), teacher, views)

    assert float(metrics["loss"]) == pytest.approx(expected["loss"], rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-4)
    ours = jax.tree.map(jnp.subtract, student, state.student)
    layers = ours["layers"]
    found = {
        "model.layers.0.self_attn.q_proj.weight": layers["attention"]["q"]["kernel"][0].T,
        "model.layers.1.mlp.down_proj.weight": layers["mlp"]["down"]["kernel"][1].T,
        "model.norm.weight": ours["norm"]["scale"],
    }
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(found[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name
