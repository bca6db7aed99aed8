"""How long data takes: reading every split of every task, and building and tokenising every view for K contexts.

    python scripts/bench_data.py --path FOLDER --model DIR [--views 4] [--tasks gsm8k,cos_e] [--out FILE]

FOLDER has the tasks' rows (see data.path). Each view is made by the code that training uses, negatives by rule and
contexts by retrieval included; only the sandbox's runs of code are left out, and reported by themselves with --sandbox.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from unisd_jax.config import load_config
from unisd_jax.data.chat import load_chat
from unisd_jax.data.loading import load_items, without_test_questions
from unisd_jax.data.pipeline import tokenize
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import TASKS
from unisd_jax.errors import UserError, report_error
from unisd_jax.io import write_json_atomic
from unisd_jax.preparation import training_views
from unisd_jax.provenance import environment

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "base.yaml"
# Where a folder has only one labelled split, training rows are a part of it.
SPLITS = {"medmcqa": ("validation[:3000]", "validation[3000:]")}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="the folder of rows")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory, for its tokenizer")
    parser.add_argument("--views", type=int, default=4, help="K, auxiliary contexts of each item")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--limit", type=int, help="use only the first N training items")
    parser.add_argument("--sandbox", action="store_true", help="also run code: gold replies and wrong ones")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    return parser.parse_args(argv)


def bench(name: str, arguments: argparse.Namespace, chat, cache: str) -> dict:
    """Seconds of each part for one task, with the numbers of items and of tokens."""
    task, place = TASKS[name], Place(path=None if name == "short_answers" else arguments.path)
    splits = dict(zip(("train", "test"), SPLITS.get(name, (None, None)), strict=True))
    began = time.monotonic()
    test = load_items(task, "test", place=place, split=splits["test"]).items
    train = []
    if task.train is not None:
        train = load_items(task, "train", place=place, split=splits["train"], limit=arguments.limit).items
        train, _ = without_test_questions(train, test)
    row = {"task": name, "train": len(train), "test": len(test), "read": time.monotonic() - began}
    if not train:
        return row
    words = [
        "--mode=custom", f"--model.path={arguments.model}", f"--data.task={name}", f"--teacher.cache_dir={cache}",
        f"--teacher.contexts.num_auxiliary_contexts={arguments.views}", "--teacher.contexts.method=retrieval",
        "--objective.agreement.level=token",
    ]  # fmt: skip
    if task.family != "code" or arguments.sandbox:
        words.append("--objective.contrast.contrastive_weight=0.1")
    else:
        task = task._replace(sound_gold=False)
    config = load_config(CONFIG, words)

    def refuse():
        raise AssertionError("nothing here needs the weights")

    began = time.monotonic()
    made = training_views(config, task, train, chat, refuse)
    row |= {"items": len(made.items), "views": time.monotonic() - began}
    for part in ("tokenise", "cached"):
        began = time.monotonic()
        examples = tokenize(made.items, made.views, chat, cache=Path(cache) / "tokens")
        row[part] = time.monotonic() - began
    row["tokens"] = int(examples.lengths.sum())
    row["total"] = row["read"] + row["views"] + row["tokenise"]
    row["items_per_second"] = row["train"] / row["total"]
    return row


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        chat, rows = load_chat(arguments.model), []
        for name in arguments.tasks.split(","):
            if name not in TASKS or name == "jsonl":
                continue
            with tempfile.TemporaryDirectory() as cache:
                try:
                    rows.append(bench(name, arguments, chat, cache))
                except UserError as error:
                    print(f"{name}: skipped, {error}")
                    continue
            print(json.dumps({key: round(x, 2) if isinstance(x, float) else x for key, x in rows[-1].items()}))
    except (UserError, OSError) as error:
        return report_error(error)
    print(f"\n{'task':<14}{'items':>7}{'read s':>8}{'views s':>9}{'tokens s':>10}{'cached s':>10}{'items/s':>9}")
    for row in rows:
        cells = [row.get(key) for key in ("read", "views", "tokenise", "cached", "items_per_second")]
        texts = ["-" if cell is None else f"{cell:.1f}" for cell in cells]
        widths = (8, 9, 10, 10, 9)
        print(f"{row['task']:<14}{row['train'] or row['test']:>7}" + "".join(map(str.rjust, texts, widths)))
    if arguments.out:
        write_json_atomic(arguments.out, {"views": arguments.views, "rows": rows} | environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
