"""Evaluate a checkpoint on a task's test items: `python -m unisd_jax.evaluate --config FILE [--model.path=DIR ...]`.

The checkpoint is `model.path`; a trained model is `runs/<name>/hf`. Replies are greedy and see no demonstration.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unisd_jax import config as configuration
from unisd_jax.config import Config
from unisd_jax.errors import UserError, report_error
from unisd_jax.eval.statistics import mean_interval
from unisd_jax.experiment import build, evaluate_test, shared_options
from unisd_jax.interrupt import INTERRUPTED
from unisd_jax.io import write_json_atomic, write_text_atomic
from unisd_jax.parallel import multihost
from unisd_jax.provenance import environment


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Means over the test items (fractions; `gold_logprob` in nats per token) and the 95% interval of `exact`."""

    folder: Path
    items: int
    means: dict[str, float]
    exact_interval: tuple[float, float]


def run(config: Config) -> EvalResult:
    """Evaluates `config.model.path`; writes `evaluation.json` and `replies.jsonl` to `output_dir/name/evaluation`.

    Raises:
      UserError: data or checkpoint cannot be used.
    """
    multihost.require_same("options", shared_options(config))
    multihost.require_shared(Path(config.output_dir))
    experiment = build(config, training=False)
    evaluation = evaluate_test(experiment, experiment.base, 0)
    interval = mean_interval(np.array([grade["exact"] for grade in evaluation.grades]), seed=config.seed)
    folder = Path(config.output_dir) / config.name / "evaluation"
    result = EvalResult(folder, len(experiment.test), evaluation.means, (interval.low, interval.high))
    lines: list[dict[str, Any]] = [
        {"id": example.item.id, "prompt": example.item.prompt, "gold": example.item.completion, "reply": reply} | grade
        for example, reply, grade in zip(experiment.test, evaluation.replies, evaluation.grades, strict=True)
    ]
    record = {
        "model": config.model.path,
        "task": config.data.task,
        "items": result.items,
        "means": result.means,
        "exact_interval": result.exact_interval,
    }
    if multihost.is_main():
        texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text_atomic(folder / "replies.jsonl", "".join(texts))
        write_json_atomic(folder / "evaluation.json", record | environment())
    multihost.wait_for_all("the evaluation")
    return result


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
                print(f"would evaluate {command.config.model.path} on {len(experiment.test)} test items")
                return multihost.leave(0, together=True)
            result = run(command.config)
    except (UserError, OSError) as error:
        return multihost.leave(report_error(error))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return multihost.leave(INTERRUPTED)
    low, high = result.exact_interval
    print(f"{result.items} test items, replies and numbers in {result.folder}")
    for name, value in result.means.items():
        interval = f"   95% interval {low:.3f} to {high:.3f}" if name == "exact" else ""
        print(f"{name:>16} {value:8.3f}{interval}")
    return multihost.leave(0, together=True)


if __name__ == "__main__":
    sys.exit(main())
