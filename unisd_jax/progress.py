"""Where a run began, and its gain and forgetting since: test items, and the distance from the base model."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from unisd_jax.errors import ConfigError
from unisd_jax.eval import summary
from unisd_jax.eval.retention import base_replies, drift
from unisd_jax.eval.runner import Evaluation
from unisd_jax.eval.scores import Network, Pairs
from unisd_jax.experiment import Experiment, evaluate_test, new_state, require_finite, student_params
from unisd_jax.io import write_json_atomic
from unisd_jax.measure import kept
from unisd_jax.parallel import multihost
from unisd_jax.resources import Phase
from unisd_jax.subject import base_subject, result_identity


class Progress:
    """Measures a run's weights against where it began; `before` is the evaluation of all test items there."""

    def __init__(self, experiment: Experiment, before: Evaluation | None):
        self._experiment, self._before = experiment, before
        self._replies: Pairs | None = None

    def is_due(self, step: int) -> bool:
        """Whether `evaluation.every` asks for a measurement after this many updates."""
        every = self._experiment.config.evaluation.every
        return every > 0 and step % every == 0

    def measure(self, params: dict[str, Any], step: int, phase: Phase) -> dict[str, float]:
        """The metrics `eval_...` after `step` updates: accuracy, gain over the same items before, drift.

        Tokens are counted in `phase`.

        Raises:
          UserError: a number is not finite.
        """
        started, config = time.monotonic(), self._experiment.config
        evaluation = evaluate_test(self._experiment, params, step, phase, limit=config.evaluation.every_items)
        exact = np.array([grade["exact"] for grade in evaluation.grades], float)
        before = np.array([grade["exact"] for grade in self._before.grades[: len(exact)]], float)
        own, gain = summary.estimate(exact, seed=config.seed), summary.gain(before, exact, seed=config.seed)
        found = {"eval_exact": own["mean"], "eval_exact_low": own["low"], "eval_exact_high": own["high"]}
        found |= {"eval_gain": gain["mean"], "eval_gain_low": gain["low"], "eval_gain_high": gain["high"]}
        found["eval_gold_logprob"] = evaluation.means["gold_logprob"]
        if (distance := self.drift(params, step)) is not None:
            found["eval_drift"] = distance
        return found | {"seconds_evaluation": time.monotonic() - started}

    def drift(self, params: dict[str, Any], step: int) -> float | None:
        """Mean token JSD from the base model on unrelated prompts, in nats; None if it is switched off.

        Raises:
          UserError: it is not finite.
        """
        experiment = self._experiment
        tokens, multiple = experiment.config.evaluation.drift_tokens, experiment.config.data.length_multiple
        if tokens == 0:
            return None
        if self._replies is None:
            self._replies = base_replies(
                experiment.sampler, experiment.base, experiment.chat, max_completion_length=tokens,
                length_multiple=multiple,
            )  # fmt: skip
        networks = (Network(experiment.model, weights) for weights in (params, experiment.base))
        distance = drift(*networks, self._replies, experiment.chat, length_multiple=multiple)
        require_finite("the drift from the base model", distance, step)
        return distance


def evaluate_before(experiment: Experiment, run_dir: Path, phase: Phase) -> Evaluation | None:
    """The starting point's evaluation; kept in the run directory, and for all runs that start from the same weights."""
    if not experiment.config.evaluation.enabled:
        return None
    path = run_dir / "before.json"
    (missing,) = multihost.largest(int(not path.exists()))
    if missing:
        adapted = experiment.config.model.lora.start is not None
        # What servers are sent, and what is measured of that, must not depend on the runs before.
        if adapted or experiment.config.rollout.engine != "jax":
            start = student_params(experiment, new_state(experiment)) if adapted else experiment.base
            evaluation = _evaluate_start(experiment, start, phase)
        else:
            evaluation = _shared_evaluation(experiment, phase)
        if multihost.is_main():
            write_json_atomic(path, evaluation._asdict())
        multihost.wait_for_all("the evaluation of the starting point")
    return Evaluation(**json.loads(path.read_text()))


def _shared_evaluation(experiment: Experiment, phase: Phase) -> Evaluation:
    """The base model's evaluation, read back where a run with the same weights, items and graders has made it."""
    base = base_subject(experiment)
    try:
        identity = result_identity(experiment, base, None)
    except ConfigError:  # items of a task of the user's own that cannot be told from others
        return _evaluate_start(experiment, base.network.params, phase)
    # Greedy: the seed changes nothing.
    identity |= {"seed": None, "stop": experiment.config.rollout.stop}
    with kept(experiment.config, "starting_points", identity, 1) as (known, add):
        if 0 not in known:
            known[0] = _evaluate_start(experiment, base.network.params, phase)._asdict()
            add({0: known[0]})
    return Evaluation(**known[0])


def _evaluate_start(experiment: Experiment, params: dict[str, Any], phase: Phase) -> Evaluation:
    print(f"evaluating the starting point on {len(experiment.test)} test items", flush=True)
    return evaluate_test(experiment, params, 0, phase)
