"""Train a model on its own answers: `python -m unisd_jax.train --config FILE [--a.b=c ...]`.

The whole method in three jumps: `run` below → `step.train_step` → `losses.objective`. A run directory holds everything
that is known about a run; the same command continues it after any interruption, to the same numbers.
"""

import dataclasses
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from unisd_jax import config as configuration
from unisd_jax.checkpoint import Checkpoints
from unisd_jax.collection import collect_views
from unisd_jax.config import Config
from unisd_jax.data.pipeline import Example, batches
from unisd_jax.errors import UserError, report_error
from unisd_jax.eval.retention import drift_from_base
from unisd_jax.eval.runner import Evaluation
from unisd_jax.experiment import Experiment, build, evaluate_test, new_state, require_finite, student_params
from unisd_jax.inert import InertMechanisms
from unisd_jax.interrupt import INTERRUPTED, Interrupted, stop_on_signal
from unisd_jax.io import write_json_atomic
from unisd_jax.metrics import METRICS_FILE, MetricsWriter, read_metrics
from unisd_jax.models import save_hf
from unisd_jax.parallel.sharding import batch_sharding, jit_step
from unisd_jax.preparation import NotPrepared
from unisd_jax.report import write_report
from unisd_jax.results import RunResult, open_run_dir, print_result, read_result, summary, write_config, write_samples
from unisd_jax.step import train_step
from unisd_jax.types import TrainState, Views


def run(config: Config) -> RunResult:
    """Trains, evaluates before and after, and writes the run directory; continues an earlier run of the same config.

    Raises:
      UserError: bad input, weights that cannot be used, a loss that is not finite.
      Interrupted: stopped by SIGINT or SIGTERM after saving.
    """
    run_dir = open_run_dir(config)
    for warning in configuration.warnings(config):
        print(f"warning: {warning}", flush=True)
    if (run_dir / "result.json").exists():
        if not (run_dir / "report.md").exists():
            write_report(run_dir)
        print(f"{run_dir} is complete; delete it or choose another name to run again")
        return read_result(run_dir)
    started = time.monotonic()
    experiment = build(config)
    data = training_batches(experiment)
    write_config(run_dir, config)
    timer = {"setup": time.monotonic() - started}
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    try:
        state = new_state(experiment)
        restored = checkpoints.restore(state)
        if restored is not None:
            state = restored.state
            data.set_state(restored.data)
            print(f"continuing after step {int(state.step)}", flush=True)
        with timed(timer, "evaluation"):
            before = evaluate_before(experiment, run_dir)
        state = train(experiment, state, data, checkpoints, run_dir)
    finally:
        checkpoints.close()
    timer["training"] = sum(record["seconds_step"] for record in read_metrics(run_dir / METRICS_FILE))
    trained = student_params(experiment, state)
    with timed(timer, "evaluation"):
        after = evaluate_test(experiment, trained, config.train.steps) if config.evaluation.enabled else None
        drift = measure_drift(experiment, trained)
    with timed(timer, "export"):
        save_hf(run_dir / "hf", experiment.model, trained, source=config.model.path)
    write_samples(run_dir, experiment, before, after)
    timer["total"] = time.monotonic() - started
    write_json_atomic(run_dir / "result.json", summary(experiment, before, after, drift, timer))
    write_report(run_dir)
    return read_result(run_dir)


def train(
    experiment: Experiment, state: TrainState, data: Iterator, checkpoints: Checkpoints, run_dir: Path
) -> TrainState:
    """Steps from `state.step` to `train.steps`, saving every `checkpoint.every` steps, on a signal, and at the end."""
    config = experiment.config
    step_for = compiled_steps(experiment, state)
    inert = InertMechanisms(config.logging.inert_after, ema_sync_steps=config.teacher.ema_sync_steps)
    options = {"project": config.logging.wandb_project, "config": configuration.to_dict(config)}
    record = {"config_hash": configuration.config_hash(config), "policy_version": 0}
    writer = MetricsWriter(
        run_dir,
        total_steps=config.train.steps,
        name=config.name,
        wandb=options if config.logging.wandb else None,
    )

    def save():
        step = int(state.step)
        checkpoints.save(state, data=data.get_state(), record=record | {"policy_version": step})

    with writer, stop_on_signal() as stop:
        checkpoints.say = writer.message
        writer.truncate_after(int(state.step))
        for earlier in read_metrics(run_dir / METRICS_FILE) if int(state.step) > 0 else ():
            inert.see({name: math.nan if value is None else value for name, value in earlier.items()})
        while int(state.step) < config.train.steps:
            started, step = time.monotonic(), int(state.step)
            examples = next(data)
            views, collection = collect_views(experiment, state, examples)
            collected = time.monotonic()
            placed = jax.device_put(views, batch_sharding(experiment.mesh))
            state, metrics = step_for(step)(state, experiment.base, placed)
            metrics = {name: float(value) for name, value in metrics.items()}
            check_metrics(metrics, config, step + 1, examples, checkpoints)
            metrics |= collection | host_metrics(experiment, views, step, started, collected)
            writer.log(step + 1, metrics)
            for warning in inert.see(metrics):
                writer.message(f"warning: {warning}")
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.train.steps:
                check_weights(state, step + 1, examples, checkpoints)
                save()
            if stop.requested:
                check_weights(state, step + 1, examples, checkpoints)
                save()
                checkpoints.wait()
                raise Interrupted(f"stopped after step {step + 1}, which is saved; the same command continues")
    checkpoints.wait()
    return state


def compiled_steps(experiment: Experiment, state: TrainState) -> Callable[[int], Callable]:
    """The train step for a step number: the same one always, but for those that audit the budget."""

    @functools.cache
    def compiled(audit: bool):
        settings = dataclasses.replace(experiment.settings, audit=audit)
        step = functools.partial(train_step, model=experiment.model, optimizer=experiment.optimizer, settings=settings)
        return jit_step(step, state, experiment.mesh)

    every = experiment.config.objective.agreement.budget.audit_steps
    return lambda step: compiled(experiment.settings.budget is not None and every > 0 and step % every == 0)


def training_batches(experiment: Experiment) -> Iterator[list[Example]]:
    """The batches of training examples, in an order fixed by the seed."""
    config = experiment.config
    return batches(experiment.train, batch_size=config.train.batch_size, seed=config.seed, shuffle=config.data.shuffle)


def check_metrics(
    metrics: dict[str, float],
    config: Config,
    step: int,
    examples: Sequence[Example],
    checkpoints: Checkpoints,
) -> None:
    """Stops before a wrong state is saved: loss or gradient not finite, or a sampler that has left the policy.

    Raises:
      UserError: names the step and the items of its batch.
    """
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(metrics[name]):
            raise UserError(f"step {step}: {name} is {metrics[name]}; {_what_is_left(examples, checkpoints)}")
    gap, limit = metrics.get("sampler_gap", 0.0), config.rollout.max_sampler_gap
    if gap > limit:
        raise UserError(
            f"step {step}: sampler and trainer differ by {gap:.3g} nats per token (rollout.max_sampler_gap "
            f"is {limit}): the rollouts are not the policy's own; {_last_good(checkpoints)}"
        )


def check_weights(state: TrainState, step: int, examples: Sequence[Example], checkpoints: Checkpoints) -> None:
    """Refuses to save a state that is not finite: the loss that would show it comes one step later.

    Raises:
      UserError: names the step and the items of its batch.
    """
    if not all_finite(state):
        raise UserError(f"step {step}: weights not finite after the update; {_what_is_left(examples, checkpoints)}")


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no leaf holds a NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _what_is_left(examples: Sequence[Example], checkpoints: Checkpoints) -> str:
    items = ", ".join(example.item.id for example in examples)
    return f"{_last_good(checkpoints)}; lower optimizer.learning_rate or look at the batch: {items}"


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    return f"last good checkpoint: {'none' if checkpoints.latest_step is None else f'step {checkpoints.latest_step}'}"


def host_metrics(experiment: Experiment, views: Views, step: int, started: float, collected: float) -> dict[str, float]:
    """What only the host knows of a step: times, lengths, learning rate, memory."""
    now = time.monotonic()
    return {
        "learning_rate": float(experiment.schedule(step)),
        "tokens_per_second": float(np.sum(views.completions.mask)) / (now - started),
        "seconds_rollout": collected - started,
        "seconds_update": now - collected,
        "seconds_step": now - started,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "policy_version": step,
        "prompts_dropped": experiment.dropped,
        "items_without_negative": experiment.without_negative,
    }


def evaluate_before(experiment: Experiment, run_dir: Path) -> Evaluation | None:
    """The starting point's evaluation; kept in the run directory, so that a resumed run does not repeat it."""
    if not experiment.config.evaluation.enabled:
        return None
    path = run_dir / "before.json"
    if not path.exists():
        print(f"evaluating the starting point on {len(experiment.test)} test items", flush=True)
        write_json_atomic(path, evaluate_test(experiment, experiment.base, 0)._asdict())
    return Evaluation(**json.loads(path.read_text()))


def measure_drift(experiment: Experiment, trained: dict[str, Any]) -> float | None:
    """Mean token JSD from the base model on unrelated prompts, in nats; None if it is switched off."""
    tokens = experiment.config.evaluation.drift_tokens
    if tokens == 0:
        return None
    drift = drift_from_base(
        experiment.sampler, experiment.model, experiment.base, trained, experiment.chat, max_completion_length=tokens,
        length_multiple=experiment.config.data.length_multiple,
    )  # fmt: skip
    require_finite("the drift from the base model", drift, experiment.config.train.steps)
    return drift


@contextmanager
def timed(timer: dict[str, float], name: str):
    """Adds the seconds of the block to `timer[name]`."""
    started = time.monotonic()
    try:
        yield
    finally:
        timer[name] = timer.get(name, 0.0) + time.monotonic() - started


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 2 bad input, 130 interrupted."""
    try:
        command = configuration.parse_command_line(sys.argv[1:] if argv is None else argv, "python -m unisd_jax.train")
        if command.print_config:
            print(configuration.to_yaml(command.config), end="")
            return 0
        if command.dry_run:
            dry_run(command.config)
            return 0
        result = run(command.config)
    except (UserError, OSError) as error:
        return report_error(error)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted: {str(error) or 'the same command continues from the last checkpoint'}", file=sys.stderr)
        return INTERRUPTED
    print_result(result)
    return 0


def dry_run(config: Config) -> None:
    """Builds everything and says what would be run; writes nothing."""
    open_run_dir(config)
    for warning in configuration.warnings(config):
        print(f"warning: {warning}")
    try:
        experiment = build(config, read_only=True)
    except NotPrepared as missing:
        print(f"{missing}: training makes them first, and so does scripts/prepare_teacher.py; nothing was run")
        return
    training_batches(experiment)
    state = new_state(experiment)
    trainable, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.student, experiment.base))
    print(f"{config.mode} on {config.model.path}: {trainable:,} trainable of {total:,} parameters")
    without = f", {experiment.without_negative} without a negative" if experiment.without_negative else ""
    print(f"{len(experiment.train)} training items ({experiment.dropped} dropped as too long{without})")
    print(f"{len(experiment.test)} test items")
    print(f"{config.train.steps} steps of {config.train.batch_size} completions; nothing was run")


if __name__ == "__main__":
    sys.exit(main())
