"""How much the teacher's targets change from one update to the next, read from a run's checkpoints."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from unisd_jax.checkpoint import Checkpoints
from unisd_jax.config import load_config
from unisd_jax.data.batching import pad_completions, pad_prompts
from unisd_jax.eval.scores import token_logps
from unisd_jax.experiment import build, new_state
from unisd_jax.models import merge
from unisd_jax.step import weights

ITEMS = 8


class Targets(NamedTuple):
    """Root mean square changes of the teacher's log-probs of gold tokens, in nats: at each update, and in all."""

    steps: list[float]
    net: float


def target_changes(run_dir: Path) -> Targets:
    """How the targets moved: those of the gold replies of the first items, after the teacher's own prompt.

    Needs a checkpoint of every step.

    Raises:
      UserError: a checkpoint is missing or cannot be read.
    """
    experiment = build(load_config(run_dir / "config.yaml"))
    examples, pad = experiment.train[:ITEMS], experiment.chat.pad_id
    prompts = pad_prompts([example.teacher for example in examples], pad_id=pad, multiple=32)
    gold = [example.gold for example in examples]
    completions = pad_completions(gold, pad_id=pad, length=max(map(len, gold)))
    checkpoints, like = (
        Checkpoints(run_dir / "checkpoints", keep=experiment.config.checkpoint.keep),
        new_state(experiment),
    )
    scores = [_scores(experiment, like, prompts, completions)]
    try:
        for step in range(1, experiment.config.train.steps + 1):
            scores.append(_scores(experiment, checkpoints.read(step, like), prompts, completions))
    finally:
        checkpoints.close()
    targets = np.stack(scores)[:, completions[1]]
    changes = np.sqrt(np.mean(np.square(np.diff(targets, axis=0)), axis=1))
    return Targets(changes.tolist(), float(np.sqrt(np.mean(np.square(targets[-1] - targets[0])))))


def _scores(experiment, state, prompts, completions) -> Float[np.ndarray, "N T"]:
    params = merge(*weights(state.teacher, experiment.base))
    return np.asarray(jax.device_get(token_logps(params, *prompts, *completions, model=experiment.model)))
