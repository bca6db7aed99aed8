"""What an update of each method takes: all in one process, taking turns, so that a slow minute meets all of them."""

import contextlib
from typing import Any

from unisd_jax.claims.runs import TIMED, Settings, composed
from unisd_jax.experiment import build, new_state
from unisd_jax.programs import StepPrograms, use_compilation_cache
from unisd_jax.resources import Meter
from unisd_jax.sampling_ahead import BatchQueue
from unisd_jax.train import one_step, training_batches

# So small a rate leaves the weights as they are: every round samples replies of the same kind.
_STILL = ("--optimizer.learning_rate=1e-12", "--train.steps=1000", "--evaluation.enabled=false")


def step_seconds(settings: Settings, rounds: int) -> dict[str, list[float]]:
    """{method: seconds of its update in each of `rounds`}, after one that compiles."""
    found: dict[str, list[float]] = {name: [] for name in TIMED}
    with contextlib.ExitStack() as stack:
        turns = {name: _prepared(settings, name, stack) for name in TIMED}
        for number in range(rounds + 1):
            for name, turn in turns.items():
                metrics = turn()
                print(f"round {number}, {name}: {metrics['seconds_step']:.2f} s", flush=True)
                if number:
                    found[name].append(metrics["seconds_step"])
    return found


def _prepared(settings: Settings, name: str, stack: contextlib.ExitStack) -> Any:
    """A function that makes one update of a method and returns its metrics."""
    method = TIMED[name]
    config = composed(settings, method.mode, settings.seeds[0], method.options, _STILL)
    use_compilation_cache(config.train.compilation_cache)
    experiment = build(config)
    stack.enter_context(contextlib.closing(experiment.sampler))
    state, meter = new_state(experiment), Meter(1, config.resources)
    queue, programs = BatchQueue(experiment, training_batches(experiment)), StepPrograms(experiment, state, say=print)

    def turn() -> dict[str, float]:
        nonlocal state
        state, metrics, _ = one_step(experiment, state, queue, programs, meter)
        return metrics

    return turn
