"""The task of one's own that docs/tasks.md shows, trained by the command from the file as it is printed there."""

import json
import re
from pathlib import Path

import pytest

from unisd_jax.data.loading import load_items
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import Form, get_task
from unisd_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = "apple bridge candle donkey ember forest garden hammer island jacket kettle ladder meadow".split()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    page = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(program.splitlines()) <= 50
    path = tmp_path_factory.mktemp("own") / "reversal.py"
    path.write_text(program, encoding="utf-8")
    return path


def write(path, words):
    rows = [{"word": word, "steps": " ".join(word[::-1])} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_example_makes_and_grades_items(example, tmp_path):
    task, rows = get_task(str(example)), write(tmp_path / "rows.jsonl", ["apple"])
    (item,) = load_items(task, "train", place=Place(file=rows)).items
    assert (item.completion, item.answer) == ("e l p p a\nAnswer: elppa", "elppa")
    assert task.grade(item.completion, item) == {"exact": 1.0, "form": 1.0}
    assert task.grade("elppa", item) == {"exact": 0.0, "form": 0.0}
    (item,) = load_items(task, "train", place=Place(file=rows), form=Form(reasoning=False)).items
    assert item.completion == "Answer: elppa" and item.prompt.endswith("Reply 'Answer: <word>'.")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: field 'word' is 'a', expected at least two letters"):
        load_items(task, "train", place=Place(file=write(tmp_path / "rows.jsonl", ["a"])))


def test_the_example_trains(example, tmp_path, main):
    options = [
        f"--data.task={example}",
        f"--data.train_path={write(tmp_path / 'train.jsonl', WORDS[:9])}",
        f"--data.test_path={write(tmp_path / 'test.jsonl', WORDS[8:])}",
        f"--teacher.cache_dir={tmp_path / 'cache'}",
        "--mode=custom",
        "--objective.contrast.contrastive_weight=0.1",
        "--teacher.contexts.num_auxiliary_contexts=2",
        "--objective.agreement.level=token",
        "--data.max_prompt_length=500",
        "--train.steps=1",
    ]
    outcome = main(tmp_path, *options)
    assert outcome.code == 0, outcome.err
    assert "train: 9 items of reversal train from" in outcome.out
    assert "1 training items left out: test items ask the same questions" in outcome.out
    assert "negatives: 8/8" in outcome.out
    assert (tmp_path / "run" / "result.json").exists()
