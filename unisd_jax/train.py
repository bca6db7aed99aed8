"""Train a model on its own answers: `python -m unisd_jax.train --config FILE [--a.b=c ...]`.

The whole method in three jumps: `run` below → `step.train_step` → `losses.objective`. A run directory holds everything
that is known about a run; the same command continues it after any interruption, to the same numbers.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unisd_jax import config as configuration
from unisd_jax.checkpoint import Checkpoints
from unisd_jax.collection import finish_batch
from unisd_jax.config import Config
from unisd_jax.data.pipeline import Example, batches
from unisd_jax.errors import UserError, report_error
from unisd_jax.experiment import (
    Experiment,
    build,
    evaluate_test,
    mesh_size,
    new_state,
    shared_options,
    student_params,
)
from unisd_jax.guards import all_finite, check_metrics, check_weights
from unisd_jax.inert import InertMechanisms
from unisd_jax.interrupt import INTERRUPTED, Interrupted, stop_on_signal
from unisd_jax.io import write_json_atomic
from unisd_jax.made_once import NotPrepared
from unisd_jax.metrics import METRICS_FILE, MetricsWriter, read_metrics
from unisd_jax.models import Lora, save_hf, save_peft
from unisd_jax.parallel import multihost
from unisd_jax.parallel.sharding import batch_sharding
from unisd_jax.programs import StepPrograms, use_compilation_cache
from unisd_jax.progress import Progress, evaluate_before
from unisd_jax.report import write_report
from unisd_jax.resources import Meter, peak_memory_gib
from unisd_jax.results import (
    RunResult,
    held,
    open_run_dir,
    print_result,
    read_result,
    summary,
    write_config,
    write_samples,
)
from unisd_jax.rollout import RolloutFailed
from unisd_jax.sampling_ahead import BatchQueue
from unisd_jax.types import TrainState, Views


def run(config: Config) -> RunResult:
    """Trains, evaluates before and after, and writes the run directory; continues an earlier run of the same config.

    All processes of a run on several hosts call this; the main one writes.

    Raises:
      UserError: bad input, weights that cannot be used, a loss that is not finite, a process that is lost.
      Interrupted: stopped by SIGINT or SIGTERM after saving.
    """
    multihost.require_same("options", shared_options(config))
    run_dir = open_run_dir(config)
    for folder in (run_dir.parent, Path(config.teacher.cache_dir)):
        multihost.require_shared(folder)
    for warning in configuration.warnings(config):
        print(f"warning: {warning}", flush=True)
    if is_complete(run_dir):
        return completed(run_dir)
    started = time.monotonic()
    use_compilation_cache(config.train.compilation_cache)
    meter = Meter(mesh_size(config), config.resources)
    with meter.phase("setup"):
        experiment = build(config)
    with contextlib.closing(experiment.sampler):
        queue = BatchQueue(experiment, training_batches(experiment))
        with held(run_dir):
            # Another process may have finished it meanwhile.
            return completed(run_dir) if is_complete(run_dir) else _run(experiment, queue, run_dir, meter, started)


def is_complete(run_dir: Path) -> bool:
    """Whether the run has its result, as all processes see it; all of them must call this."""
    return any(multihost.largest(int((run_dir / "result.json").exists())))


def completed(run_dir: Path) -> RunResult:
    """The result of a run that is complete."""
    if multihost.is_main() and not (run_dir / "report.md").exists():
        write_report(run_dir)
    print(f"{run_dir} is complete; delete it or choose another name to run again")
    return read_result(run_dir)


def _run(experiment: Experiment, queue: BatchQueue, run_dir: Path, meter: Meter, started: float) -> RunResult:
    config = experiment.config
    with meter.phase("setup"):
        if multihost.is_main():
            write_config(run_dir, config)
        multihost.wait_for_all("the configuration")
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    try:
        state = new_state(experiment)
        restored = checkpoints.restore(state)
        continued = 0 if restored is None else int(restored.state.step)
        if restored is not None:
            require_same_base(experiment, restored.record)
            state = restored.state
            queue.set_state(restored.data, restored.record.get("begun", []))
            print(f"continuing after step {continued}", flush=True)
        with meter.phase("evaluation") as phase:
            before = evaluate_before(experiment, run_dir, phase)
        progress, timer = Progress(experiment, before), {}
        state = train(experiment, state, queue, checkpoints, run_dir, progress, meter, timer, started)
    finally:
        checkpoints.close()
    timer["training"] = sum(record["seconds_step"] for record in read_metrics(run_dir / METRICS_FILE))
    trained = student_params(experiment, state)
    with meter.phase("evaluation") as phase:
        after = evaluate_test(experiment, trained, config.train.steps, phase) if config.evaluation.enabled else None
        drift = progress.drift(trained, config.train.steps)
    with meter.phase("export"):
        export(run_dir, experiment, state, trained)
    timer |= {name: meter.seconds(name) for name in ("setup", "evaluation", "export")}
    timer["total"] = time.monotonic() - started
    if multihost.is_main():
        write_samples(run_dir, experiment, before, after)
        if after is not None:
            write_json_atomic(run_dir / "after.json", after._asdict())
        result = summary(experiment, before, after, drift, timer, meter.record())
        write_json_atomic(run_dir / "result.json", result | {"continued_after": continued})
        write_report(run_dir)
    multihost.wait_for_all("the result")
    return read_result(run_dir)


def train(
    experiment: Experiment,
    state: TrainState,
    queue: BatchQueue,
    checkpoints: Checkpoints,
    run_dir: Path,
    progress: Progress,
    meter: Meter,
    timer: dict[str, float],
    started: float,
) -> TrainState:
    """Steps from `state.step` to `train.steps`, saving every `checkpoint.every` steps, on a signal, and at the end.

    Puts the time from `started` to the end of the first step into `timer["start_up"]`.
    """
    config = experiment.config
    inert = InertMechanisms(config.logging.inert_after, ema_sync_steps=config.teacher.ema_sync_steps)
    options = {"project": config.logging.wandb_project, "config": configuration.to_dict(config)}
    record = {"config_hash": configuration.config_hash(config), "base_revision": base_revision(experiment)}
    writer = MetricsWriter(
        run_dir,
        total_steps=config.train.steps,
        name=config.name,
        evaluated=config.evaluation.every > 0,
        is_main=multihost.is_main(),
        wandb=options if config.logging.wandb else None,
        tensorboard=config.logging.tensorboard,
    )

    def save(*, begun_too: bool = True):
        place, begun = queue.get_state() if begun_too else (queue.place(state), [])
        checkpoints.save(state, data=place, record=record | {"policy_version": int(state.step), "begun": begun})

    with writer, stop_on_signal() as stop:
        programs = StepPrograms(experiment, state, say=writer.message)
        checkpoints.say = writer.message
        writer.truncate_after(int(state.step))
        multihost.wait_for_all("the metrics of earlier steps")
        for earlier in read_metrics(run_dir / METRICS_FILE) if int(state.step) > 0 else ():
            inert.see({name: math.nan if value is None else value for name, value in earlier.items()})
        try:
            while int(state.step) < config.train.steps:
                step = int(state.step)
                state, metrics, examples = one_step(experiment, state, queue, programs, meter)
                check_metrics(metrics, config, step + 1, examples, checkpoints)
                # A run that is to stop has no time for it: what is not saved is lost.
                try:
                    if progress.is_due(step + 1) and not any(multihost.largest(int(stop.requested))):
                        with meter.phase("evaluation") as phase:
                            metrics |= progress.measure(student_params(experiment, state), step + 1, phase)
                finally:
                    writer.log(step + 1, metrics)
                if "start_up" not in timer:
                    timer["start_up"] = time.monotonic() - started
                    writer.message(start_up_line(timer["start_up"], meter, programs))
                for warning in inert.see(metrics):
                    writer.message(f"warning: {warning}")
                if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.train.steps:
                    check_weights(state, step + 1, examples, checkpoints)
                    save()
                if any(multihost.largest(int(stop.requested))):
                    check_weights(state, step + 1, examples, checkpoints)
                    save()
                    checkpoints.wait()
                    raise Interrupted(f"stopped after step {step + 1}, which is saved; the same command continues")
        except RolloutFailed as error:
            raise stopped_by_engine(error, state, save, checkpoints) from error
    checkpoints.wait()
    return state


def one_step(
    experiment: Experiment, state: TrainState, queue: BatchQueue, programs: StepPrograms, meter: Meter
) -> tuple[TrainState, dict[str, float], Sequence[Example]]:
    """Collects the views of a batch and updates; the metrics are those of the step and what the host knows of it."""
    begun, step, compiling = time.monotonic(), int(state.step), programs.seconds
    with meter.phase("rollout") as phase:
        batch = queue.take(state)
        views, collection = finish_batch(experiment, batch, phase)
    collected = time.monotonic()
    with meter.phase("update") as phase:
        views = jax.device_put(views, batch_sharding(experiment.mesh))
        state, metrics = programs.run(state, views)
        metrics = {name: float(value) for name, value in metrics.items()}
        phase.add(**view_tokens(views))
    metrics |= collection | host_metrics(experiment, views, step, begun, collected) | experiment.sampler.measurements()
    metrics |= {"programs_compiled": len(programs), "seconds_compiling": programs.seconds - compiling}
    return state, metrics, batch.examples


def stopped_by_engine(
    error: RolloutFailed, state: TrainState, save: Callable[..., None], checkpoints: Checkpoints
) -> UserError:
    """The error of a run whose engine is gone: its state is whole, and saved where one process can do so alone."""
    step = int(state.step)
    if multihost.process_count() > 1 or step == 0 or not all_finite(state):
        return error
    save(begun_too=False)
    checkpoints.wait()
    return RolloutFailed(f"{error}; step {step} is saved, the same command continues")


def base_revision(experiment: Experiment) -> str | None:
    """Which snapshot of a hub model this is; None for a directory."""
    checkpoint = experiment.checkpoint
    return checkpoint.name if checkpoint.parent.name == "snapshots" else None


def require_same_base(experiment: Experiment, record: dict[str, Any]) -> None:
    """Refuses to put an adapter on weights that it was not trained on.

    Raises:
      UserError: the hub's model has another revision than when the run began.
    """
    began, now, path = record.get("base_revision"), base_revision(experiment), experiment.config.model.path
    if began != now:
        raise UserError(
            f"model.path: {path} is revision {now}, but this run began with {began}; "
            f"name that one: {path.partition('@')[0]}@{began}"
        )


def view_tokens(views: Views) -> dict[str, int]:
    """How many tokens of prompts and completions the networks read; each view reads the completions again."""
    prompts = (views.student, views.teacher, views.contexts, views.negative)
    masks = [view.mask for view in prompts if view is not None]
    times = sum(mask.shape[1] if mask.ndim == 3 else 1 for mask in masks)
    return {
        "prompt_tokens": sum(int(jnp.sum(mask)) for mask in masks),
        "completion_tokens": times * int(jnp.sum(views.completions.mask)),
    }


def start_up_line(seconds: float, meter: Meter, programs: StepPrograms) -> str:
    """Where the time before and in the first step went."""
    parts = {"data and weights": meter.seconds("setup"), "evaluation": meter.seconds("evaluation")}
    parts["compiling"] = programs.seconds
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return f"first step done {seconds:.1f} s after the start ({spent})"


def training_batches(experiment: Experiment) -> Iterator[list[Example]]:
    """The batches of training examples, of each this host's rows, in an order fixed by the seed."""
    config = experiment.config
    rows = multihost.own_rows(batch_sharding(experiment.mesh), config.train.batch_size)
    return batches(
        experiment.train, batch_size=config.train.batch_size, seed=config.seed, shuffle=config.data.shuffle, rows=rows
    )


def host_metrics(experiment: Experiment, views: Views, step: int, started: float, collected: float) -> dict[str, float]:
    """What only the host knows of a step: times, lengths, learning rate, memory."""
    now = time.monotonic()
    # Not every runtime counts: a CPU's does not.
    memory = jax.local_devices()[0].memory_stats() or {}
    device = {"device_memory_gib": memory["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in memory else {}
    return device | {
        "learning_rate": float(experiment.schedule(step)),
        "tokens_per_second": float(jnp.sum(views.completions.mask)) / (now - started),
        "seconds_rollout": collected - started,
        "seconds_update": now - collected,
        "seconds_step": now - started,
        "peak_memory_gib": peak_memory_gib(),
        "prompts_dropped": experiment.dropped,
        "items_without_negative": experiment.without_negative,
    }


def export(run_dir: Path, experiment: Experiment, state: TrainState, trained: dict[str, Any]) -> None:
    """The trained model in Hugging Face's format, its adapters in PEFT's; the main process writes what all fetch."""
    source = experiment.checkpoint
    writing = {"fetch": multihost.gather, "write": multihost.is_main()}
    save_hf(run_dir / "hf", experiment.model, trained, source=source, **writing)
    for name, adapter in {"adapter": state.student, "teacher_adapter": state.teacher}.items():
        if isinstance(adapter, Lora):
            whole = jax.tree.map(multihost.gather, adapter)
            if multihost.is_main():
                save_peft(run_dir / name, experiment.model, whole, base=experiment.config.model.path)
    multihost.wait_for_all("the export")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 2 bad input, 130 interrupted."""
    try:
        command = configuration.parse_command_line(sys.argv[1:] if argv is None else argv, "python -m unisd_jax.train")
        if command.print_config:
            print(configuration.to_yaml(command.config), end="")
            return 0
        multihost.initialize(command.config.distributed)
        with multihost.no_process_left_waiting():
            if command.dry_run:
                dry_run(command.config)
                return multihost.leave(0, together=True)
            result = run(command.config)
    except (UserError, OSError) as error:
        return multihost.leave(report_error(error))
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted: {str(error) or 'the same command continues from the last checkpoint'}", file=sys.stderr)
        return multihost.leave(INTERRUPTED, together=isinstance(error, Interrupted))
    print_result(result)
    return multihost.leave(0, together=True)


def dry_run(config: Config) -> None:
    """Builds everything and says what would be run; writes nothing."""
    open_run_dir(config)
    for warning in configuration.warnings(config):
        print(f"warning: {warning}")
    try:
        experiment = build(config, read_only=True)
    except NotPrepared as missing:
        print(f"{missing}: training makes them first, and so do the scripts prepare_*.py; nothing was run")
        return
    experiment.sampler.close()
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
