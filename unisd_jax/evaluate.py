"""Measure a checkpoint on a task's test items: `python -m unisd_jax.evaluate --config FILE [--model.path=DIR ...]`.

The checkpoint is `model.path`; a trained model is `runs/<name>/hf`, or `--model.lora.start=runs/<name>/adapter` on top
of the model it was trained from. Replies see no demonstration.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd_jax import config as configuration
from unisd_jax.config import Config
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.eval import summary
from unisd_jax.eval.grading import grade_all, numeric
from unisd_jax.eval.report import write_report
from unisd_jax.experiment import Experiment, build, mesh_size, shared_options
from unisd_jax.interrupt import INTERRUPTED
from unisd_jax.io import write_json_atomic, write_text_atomic
from unisd_jax.measure import distances_on, measure, option_logprobs, option_replies, sample_rows
from unisd_jax.measured import item_lines, numbers
from unisd_jax.models import local_checkpoint
from unisd_jax.parallel import multihost
from unisd_jax.programs import use_compilation_cache
from unisd_jax.provenance import environment
from unisd_jax.resources import Meter
from unisd_jax.results import require_writable
from unisd_jax.sandbox import describe_containment
from unisd_jax.subject import Subject, adapted_and_base, result_identity

SUMMARY, ITEMS = "summary.json", "items.jsonl"


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Means of the grades over the test items, the 95% interval of `exact`, and the contents of summary.json."""

    folder: Path
    items: int
    means: dict[str, float]
    exact_interval: tuple[float, float]
    details: dict[str, Any]


def run(config: Config) -> EvalResult:
    """Measures `config.model.path` and writes `output_dir/name/evaluation/<task>-<key>/`.

    The key is a hash of all that the numbers depend on (weights, items, sampling, graders), so a finished evaluation is
    read back, never made again or overwritten, and an interrupted one goes on.

    Raises:
      UserError: data or checkpoints cannot be used.
    """
    multihost.require_same("options", shared_options(config))
    for folder in (Path(config.output_dir), Path(config.teacher.cache_dir)):
        multihost.require_shared(folder)
    use_compilation_cache(config.train.compilation_cache)
    meter = Meter(mesh_size(config), config.resources)
    with meter.phase("setup"):
        experiment = build(config, training=False)
    with contextlib.closing(experiment.sampler):
        return _run(experiment, meter)


def _run(experiment: Experiment, meter: Meter) -> EvalResult:
    config = experiment.config
    with meter.phase("setup"):
        _check_task(experiment)
        subject, base = adapted_and_base(experiment)
        identity = result_identity(experiment, subject, base)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.output_dir) / config.name / "evaluation" / f"{experiment.task.name}-{key}"
    if any(multihost.largest(int((folder / SUMMARY).exists()))):
        print(f"{folder} has this evaluation already; delete it to measure again")
        return read_result(folder)
    _announce(experiment, base)
    own = measure(experiment, subject, meter, base=base, retries=config.measure.retries)
    other = reverse = None
    if base is not None:
        other = measure(experiment, base, meter, retries=config.measure.retries)
        replies = [row.reply for row in other.rows]
        reverse = distances_on(experiment, subject, base, replies, meter, replies_of=base)
    options = []
    if config.measure.option_likelihood:
        for who in (subject,) if base is None else (subject, base):
            logps = option_logprobs(experiment, who, meter)
            options.append(summary.option_scores(experiment.task, [row.item for row in experiment.test], logps))
    details = _header(experiment, base, key, identity) | numbers(experiment, own, other, reverse, options)
    details = summary.plain(details | {"resources": meter.record(), **environment()})
    if multihost.is_main():
        write_text_atomic(folder / ITEMS, item_lines(experiment, own, other, options))
        write_report(folder, details)
        write_json_atomic(folder / SUMMARY, details)  # the last: where it is, everything is
    multihost.wait_for_all("the evaluation")
    return read_result(folder)


def _header(experiment: Experiment, base: Subject | None, key: str, identity: dict[str, Any]) -> dict[str, Any]:
    """What was measured."""
    config = experiment.config
    return {
        "name": config.name,
        "task": experiment.task.name,
        "model": config.model.path,
        "adapter": config.model.lora.start,
        "base": None if base is None else config.measure.base or config.model.path,
        "items": len(experiment.test),
        "samples": config.measure.samples,
        "key": key,
        "identity": identity,
        "settings": _settings(config),
    }


def read_result(folder: Path) -> EvalResult:
    """A finished evaluation."""
    details = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    exact = details["metrics"]["exact"]
    means = {name: values["mean"] for name, values in details["metrics"].items()}
    return EvalResult(folder, details["items"], means, (exact["low"], exact["high"]), details)


def _settings(config: Config) -> dict[str, Any]:
    """The options that an evaluation reads."""
    tree = configuration.to_dict(config)
    names = ("seed", "model", "data", "evaluation", "measure", "resources", "head", "mesh")
    return {name: tree[name] for name in names} | {
        "rollout": {name: tree["rollout"][name] for name in ("engine", "stop")}
    }


def _check_task(experiment: Experiment) -> None:
    """Refuses what would fail only after the replies are there."""
    config, task, options = experiment.config, experiment.task, experiment.config.measure
    if options.option_likelihood and task.options is None:
        raise ConfigError(
            f"measure.option_likelihood compares the options of multiple choice, and data.task={task.name} has none; "
            "set it to false"
        )
    first = experiment.test[0].item
    ((grade,),) = grade_all([task.grade], [first.completion], [first])
    if options.retries and "form" not in numeric(grade):
        raise ConfigError(
            f"measure.retries samples again what has not the asked-for form, and data.task={task.name} does not grade "
            "a 'form'; set it to 0"
        )
    limit = experiment.model.config.max_position
    for example in experiment.test:
        replies = option_replies(experiment, example) if options.option_likelihood else []
        longest = len(example.student) + max(len(ids) for ids in (example.gold, *replies))
        if longest > limit:
            raise ConfigError(
                f"{example.item.id}: its prompt and gold reply have {longest} tokens, the model reads at most {limit}; "
                "choose other items or another model"
            )
    require_writable(Path(config.output_dir) / config.name / "evaluation")


def _announce(experiment: Experiment, base: Subject | None) -> None:
    config = experiment.config
    sampled = "greedily" if config.measure.temperature == 0 else f"at temperature {config.measure.temperature:g}"
    times = "" if config.measure.samples == 1 else f" {config.measure.samples} times"
    print(f"replying to {len(experiment.test)} items of {experiment.task.name}{times}, {sampled}", flush=True)
    if base is None:
        print("no measure.base: gain, drift and retention are not measured", flush=True)
    if experiment.task.family == "code" and multihost.is_main():
        print(f"code of replies runs in the {describe_containment()}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    try:
        command = configuration.parse_command_line(words, "python -m unisd_jax.evaluate")
        if command.print_config:
            print(configuration.to_yaml(command.config), end="")
            return 0
        multihost.initialize(command.config.distributed)
        with multihost.no_process_left_waiting():
            if command.dry_run:
                experiment = build(command.config, read_only=True, training=False)
                _check_task(experiment)
                if command.config.measure.base is not None:
                    local_checkpoint(command.config.measure.base)
                rows = len(sample_rows(experiment))
                print(f"would measure {command.config.model.path}: {rows} replies to {len(experiment.test)} test items")
                return multihost.leave(0, together=True)
            result = run(command.config)
    except (UserError, OSError) as error:
        return multihost.leave(report_error(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return multihost.leave(INTERRUPTED)
    _print(result)
    return multihost.leave(0, together=True)


def _print(result: EvalResult) -> None:
    """The few lines a user waits for."""
    details = result.details
    print(f"{result.items} test items; report: {result.folder / 'report.md'}")
    for name, values in details["metrics"].items():
        print(f"{name:>16} {values['mean']:8.3f}   95% interval {values['low']:.3f} to {values['high']:.3f}")
    gain = (details["gain"] or {}).get("exact")
    if gain:
        jsd = details["retention"]["jsd"]
        moved = f"; drift {jsd['mean']:.4f} nats per token" if jsd else ""
        print(
            f"gain over the base {100 * gain['mean']:+.1f} points "
            f"(95% interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}){moved}"
        )


if __name__ == "__main__":
    sys.exit(main())
