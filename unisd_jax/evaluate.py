"""Measure a checkpoint on a task's test items: `python -m unisd_jax.evaluate --config FILE [--model.path=DIR ...]`.

The checkpoint is `model.path`; a trained model is `runs/<name>/hf`, or `--model.lora.start=runs/<name>/adapter` on top
of the model it was trained from. Replies see no demonstration.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unisd_jax import config as configuration
from unisd_jax.config import Config
from unisd_jax.errors import ConfigError, UserError, report_error
from unisd_jax.eval import retention, summary
from unisd_jax.eval.grading import numeric
from unisd_jax.eval.report import write_report
from unisd_jax.experiment import Experiment, build, mesh_size, require_finite, shared_options
from unisd_jax.interrupt import INTERRUPTED
from unisd_jax.io import write_json_atomic, write_text_atomic
from unisd_jax.measure import (
    Measured,
    Subject,
    adapted_and_base,
    item_hash,
    measure,
    option_logprobs,
    result_identity,
    reverse_distances,
    sample_rows,
)
from unisd_jax.parallel import multihost
from unisd_jax.programs import use_compilation_cache
from unisd_jax.provenance import environment
from unisd_jax.resources import Meter
from unisd_jax.sandbox import describe_containment

SUMMARY, ITEMS = "summary.json", "items.jsonl"


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Means over the test items (fractions; `ppl_fit` a perplexity), the 95% interval of `exact`, and summary.json."""

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
    other = None if base is None else measure(experiment, base, meter)
    details = {"name": config.name, "key": key, "identity": identity} | _summary(
        experiment, subject, base, own, other, meter
    )
    if multihost.is_main():
        _write(folder, experiment, own, other, details)
    multihost.wait_for_all("the evaluation")
    return read_result(folder)


def read_result(folder: Path) -> EvalResult:
    """A finished evaluation."""
    details = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    exact = details["metrics"]["exact"]
    means = {name: values["mean"] for name, values in details["metrics"].items()}
    return EvalResult(folder, details["items"], means, (exact["low"], exact["high"]), details)


def _check_task(experiment: Experiment) -> None:
    """Refuses what would fail only after the replies are there."""
    if experiment.config.measure.option_likelihood and experiment.task.options is None:
        raise ConfigError(
            f"measure.option_likelihood compares the options of multiple choice, and data.task={experiment.task.name} "
            "has none; set it to false"
        )


def _announce(experiment: Experiment, base: Subject | None) -> None:
    config = experiment.config
    sampled = "greedily" if config.measure.temperature == 0 else f"at temperature {config.measure.temperature:g}"
    times = "" if config.measure.samples == 1 else f" {config.measure.samples} times"
    print(f"replying to {len(experiment.test)} items of {experiment.task.name}{times}, {sampled}", flush=True)
    if base is None:
        print("no measure.base: gain, drift and retention are not measured", flush=True)
    if experiment.task.family == "code" and multihost.is_main():
        print(f"code of replies runs in the sandbox: {describe_containment()}", flush=True)


def _summary(
    experiment: Experiment, subject: Subject, base: Subject | None, own: Measured, other: Measured | None, meter: Meter
) -> dict[str, Any]:
    """The contents of summary.json."""
    config, seed = experiment.config, experiment.config.seed
    items, samples = [example.item for example in experiment.test], config.measure.samples
    found = {
        "task": experiment.task.name,
        "model": config.model.path,
        "adapter": config.model.lora.start,
        "base": None if base is None else config.measure.base or config.model.path,
        "items": len(items),
        "samples": samples,
        **_of_replies(experiment, own),
        "retries": None,
        "subjects": summary.subjects(items, summary.item_scores(own.grades, samples)["exact"], seed=seed),
        "option_likelihood": None,
        "before": None,
        "gain": None,
        "retention": None,
    }
    if config.measure.retries:
        retried = {row: grade for row, (_, grade) in own.retried.items()}
        found["retries"] = summary.with_retries(own.grades, retried, samples, seed=seed)
    if config.measure.option_likelihood:
        logps = option_logprobs(experiment, subject, meter)
        found["option_likelihood"] = summary.option_likelihood(experiment.task, items, logps, seed=seed)
    if base is not None and other is not None:
        found |= _beside_base(experiment, subject, base, own, other, meter)
    found["minimum_detectable"] = summary.detectable_alone(summary.item_scores(own.grades, samples)["exact"])
    found |= {"settings": _settings(config), "resources": meter.record(), **environment()}
    return summary.plain(found)


def _of_replies(experiment: Experiment, measured: Measured) -> dict[str, Any]:
    """What is said of one checkpoint's replies, whichever it is.

    Raises:
      UserError: the weights give numbers that are not finite.
    """
    seed, samples = experiment.config.seed, experiment.config.measure.samples
    graded = summary.graded(measured.grades, samples, seed=seed)
    fit = retention.perplexity(measured.gold, seed=seed)
    require_finite("the log-prob of the gold replies", sum(row["logp"] for row in measured.gold), 0)
    lengths = np.array([len(reply.ids) for reply in measured.replies], float)
    finished = np.array([reply.finished for reply in measured.replies], float)
    released = None
    if measured.released is not None:
        released = summary.graded(measured.released, samples, seed=seed)
    return graded | {
        "released": released,
        "ppl_fit": fit,
        "truncated": summary.estimate((1 - finished).reshape(-1, samples).mean(1), seed=seed),
        "reply_tokens": summary.estimate(lengths.reshape(-1, samples).mean(1), seed=seed),
    }


def _beside_base(
    experiment: Experiment, subject: Subject, base: Subject, own: Measured, other: Measured, meter: Meter
) -> dict[str, Any]:
    """Gain over the base, and how far this checkpoint has moved from it on this task."""
    seed, samples = experiment.config.seed, experiment.config.measure.samples
    scores = [summary.item_scores(measured.grades, samples) for measured in (other, own)]
    reverse = reverse_distances(experiment, subject, base, other.replies, meter)
    lengths = [np.array([len(reply.ids) for reply in measured.replies], float) for measured in (other, own)]
    forward = retention.distances(own.distances, seed=seed)
    return {
        "before": _of_replies(experiment, other),
        "gain": {name: summary.gain(scores[0][name], scores[1][name], seed=seed) for name in scores[0]},
        "retention": {
            # The base's perplexity on the adapted model's replies, pooled over tokens; the release averages per reply.
            "ppl_ret": forward["ppl_base"],
            "jsd": forward["jsd"],
            "forward": forward,
            "reverse": retention.distances(reverse, seed=seed),
            "paired": retention.paired(own.distances, reverse, seed=seed),
            "reply_tokens_change": summary.gain(*lengths, seed=seed),
            "released": {
                "retention": retention.released(own.distances, "logp_base"),
                "reverse": retention.released(reverse, "logp_adapted"),
            },
        },
    }


def _settings(config: Config) -> dict[str, Any]:
    """The options that an evaluation reads."""
    tree = configuration.to_dict(config)
    kept = {name: tree[name] for name in ("seed", "model", "data", "evaluation", "measure", "resources", "mesh")}
    return kept | {"rollout": {"stop": tree["rollout"]["stop"]}}


def _write(
    folder: Path, experiment: Experiment, own: Measured, other: Measured | None, details: dict[str, Any]
) -> None:
    """The files of an evaluation; the summary comes last, so that where it is everything is."""
    samples, lines = experiment.config.measure.samples, []
    for number, example in enumerate(experiment.test):
        rows = range(number * samples, (number + 1) * samples)
        grades = [numeric(own.grades[row]) for row in rows]
        line = {
            "id": example.item.id,
            "item": item_hash(example),
            "prompt": example.item.prompt,
            "gold": example.item.completion,
            "subject": example.item.details.get("subject") or None,
            "grades": {name: float(np.mean([grade[name] for grade in grades])) for name in grades[0]},
            "replies": [_reply(own, row) for row in rows],
        }
        if other is not None:
            line["base_replies"] = [_reply(other, row) for row in rows]
        lines.append(json.dumps(summary.plain(line), ensure_ascii=False, allow_nan=False) + "\n")
    write_text_atomic(folder / ITEMS, "".join(lines))
    write_report(folder, details)
    write_json_atomic(folder / SUMMARY, details)


def _reply(measured: Measured, row: int) -> dict[str, Any]:
    reply = measured.replies[row]
    found = {
        "text": measured.texts[row],
        "tokens": len(reply.ids),
        "finished": reply.finished,
        "grades": measured.grades[row],
        "released": None if measured.released is None else measured.released[row],
        "distances": None if measured.distances is None else measured.distances[row],
    }
    if row in measured.retried:
        found["retry_grades"] = measured.retried[row][1]
    return found


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
