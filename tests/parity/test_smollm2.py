"""The real SmolLM2-135M-Instruct against numbers that transformers and torch computed from the same checkpoint.

`scripts/make_smollm2_reference.py` made them and says what each array is.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisd_jax.models import load_hf
from unisd_jax.rollout import JaxSampler, Sampling

# Both sides sum in float32 in other orders, through 30 layers. Logits reach 40, where neighbouring float32 numbers are
# 4e-6 apart; measured on one CPU they differ by 6e-5 at most. A wrong detail shows above 1e-2: an epsilon of 1e-6
# instead of 1e-5 moves them by 0.011, a rotary base off by 1% by 0.010.
LOGITS = 5e-4


@pytest.fixture(scope="module")
def expected():
    with np.load(Path(__file__).parent / "smollm2_reference.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def loaded(smollm2_path):
    return load_hf(smollm2_path, dtype=jnp.float32)


def test_logits(loaded, expected):
    """The eight likeliest tokens at six positions, the sum over all others, and the states before the head."""
    model, params = loaded
    positions = expected["top_ids"].shape[1]

    @jax.jit
    def scores(params, ids, mask):
        hidden = model.hidden(params, ids, mask)[:, -positions:]
        return hidden, model.logits(params, hidden)

    hidden, logits = map(np.asarray, scores(params, expected["input_ids"], expected["attention_mask"].astype(bool)))
    top = np.take_along_axis(logits, expected["top_ids"], axis=-1)
    np.testing.assert_allclose(top, expected["top_logits"], rtol=0, atol=LOGITS)
    total = np.log(np.sum(np.exp(np.float64(logits)), axis=-1))
    np.testing.assert_allclose(total, expected["log_sum_exp"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), expected["hidden_norm"], rtol=1e-5)


def test_greedy_tokens(loaded, expected):
    """Each choice is decided by more than two logits can be off together, so all tokens must be the same."""
    assert expected["greedy_margin"].min() > 2 * LOGITS
    model, params = loaded
    sampler = JaxSampler(model)
    sampler.publish(params, 0)
    end_of_turn = padding = 2
    rollout = sampler.generate(
        expected["input_ids"],
        expected["attention_mask"].astype(bool),
        Sampling(expected["greedy_ids"].shape[1], (end_of_turn,), padding, temperature=0.0),
        key=jax.random.key(0),
        version=0,
    )
    np.testing.assert_array_equal(rollout.ids, expected["greedy_ids"])
    np.testing.assert_array_equal(rollout.mask, np.isfinite(expected["greedy_margin"]))
