"""Every prompt that a task's items lead to, as text in tests/unit/data/prompts for a reader's eye and this comparison.

`UPDATE_PROMPTS=1 python -m pytest tests/unit/test_rendered_prompts.py` writes the files anew: read what changed.
"""

import os
from itertools import product
from pathlib import Path

import pytest
from task_rows import DONORS, MBPP_SANITIZED, ROWS

from unisd_jax.config import load_config
from unisd_jax.data.rows import Row
from unisd_jax.data.tasks import TASKS, Form, get_task
from unisd_jax.preparation import context_messages, primary_messages
from unisd_jax.teacher.prompts import induction_messages, student_messages, teacher_messages

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
FOLDER = Path(__file__).resolve().parent / "data" / "prompts"
RENEW = "UPDATE_PROMPTS=1 python -m pytest tests/unit/test_rendered_prompts.py writes it anew: read what changed"
INSTRUCTION = "Look for what the question turns on, and check the reply once more."
# A wrong reply in the form of the good one; what rules make of a reply is tested with them.
WRONG = {
    "short_answers": '{"answer": "warm"}',
    "mbpp": "```python\ndef helper(x):\n    return x\ndef add_one(x):\n    return helper(x) - 1\n```",
    "tooluse": 'Thought: The forecast of three days is asked for.\nAction: forecast\nAction Input: {"city": "Oslo"}',
    "scienceqa": "Reasoning: Steam is water as a gas.\nAnswer: A",
    "cos_e": "Reasoning: Fish breathe in water.\nAnswer: A",
    "medmcqa": "Reasoning: Scurvy is a lack of ascorbic acid.\nAnswer: A",
    "gsm8k": "There are 12 * 3 = 36 pens.\n#### 38",
}
# Rows whose prompts or replies are made in another way: the other version, several calls, no explanation.
OTHER_KINDS = {
    "mbpp": [MBPP_SANITIZED],
    "tooluse": DONORS["tooluse"][1:],
    "scienceqa": DONORS["scienceqa"][1:],
}


def items(name, rows, form):
    task = get_task(name)
    return [task.make(Row(f"rows.jsonl, line {line}", row), line - 1, form) for line, row in enumerate(rows, start=1)]


def section(title, messages):
    """A heading, then each message below its role."""
    said = [f"[{message['role']}]\n{message['content']}" for message in messages]
    return "\n".join([f"{'=' * 12} {title} {'=' * 12}", *said])


def forms(name):
    """Each form and what it is called; those that change nothing are left out later."""
    extra = {"scienceqa": [{"lecture": False}, {"hint": False}, {"lecture": False, "hint": False}]}.get(name, [])
    for answer, reasoning, released in product(get_task(name).answers, (True, False), (False, True)):
        title = f"answer {answer}, reasoning {'on' if reasoning else 'off'}{', as released' if released else ''}"
        yield title, Form(answer=answer, reasoning=reasoning, as_released=released)
    for options in extra:
        yield ", ".join(f"without {option}" for option in options), Form(**options)


def configure(name, *options):
    usual = ("mode=custom", "model.path=none", f"data.task={name}")
    return load_config(BASE, [f"--{option}" for option in (*usual, *options)])


def never():
    raise AssertionError("the weights were loaded")


def prompts(name):
    """The text of a task's golden file."""
    shown, seen, pairs = [], {}, set()
    rows = [ROWS[name], *OTHER_KINDS.get(name, [])]
    for title, form in forms(name):
        for number, item in enumerate(items(name, rows, form)):
            where = title if number == 0 else f"{title}, row of another kind"
            if (item.prompt, item.completion) in pairs:
                continue
            pairs.add((item.prompt, item.completion))
            if item.prompt in seen:
                shown.append(section(f"student: {where}", []) + f"\n(the prompt of: {seen[item.prompt]})")
            else:
                shown.append(section(f"student: {where}", student_messages(item.prompt, item.earlier)))
            seen.setdefault(item.prompt, where)
            shown.append(section("gold completion", [{"role": "assistant", "content": item.completion}]))
    if get_task(name).train is not None:
        shown += views(name)
    return "\n\n".join(shown) + "\n"


def views(name):
    """The teacher's conversations of a task's first row, whose donors are the two others."""
    found = items(name, [ROWS[name], *DONORS[name]], Form())
    first, shown = found[0], []
    for placement in ("inline", "turns"):
        config = configure(
            name, f"teacher.placement={placement}", "teacher.contexts.num_auxiliary_contexts=2",
            "teacher.contexts.demonstrations=2", "objective.agreement.level=token",
        )  # fmt: skip
        shown.append(section(f"teacher, {placement}", primary_messages(config, found)[0]))
        if first.context is not None:
            shown.append(section(f"teacher, {placement}, no context of its own", primary_messages(config, found)[1]))
        contexts = context_messages(config, get_task(name), found, None, never)
        shown.append(section(f"auxiliary, {placement}", contexts[0][0]))
        if first.earlier:
            shown.append(section(f"auxiliary of the second row, {placement}", contexts[1][0]))
        wrong = teacher_messages(
            first.prompt, first.negative or WRONG[name], condition="gold", placement=placement, earlier=first.earlier
        )
        shown.append(section(f"negative, {placement}", wrong))
    return [*shown, section("induction", induction_messages(first.prompt, INSTRUCTION, first.earlier))]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_the_golden_file(name):
    path, text = FOLDER / f"{name}.txt", prompts(name)
    if os.environ.get("UPDATE_PROMPTS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    assert path.exists(), f"{path.name} is missing; {RENEW}"
    golden = path.read_text("utf-8")
    assert text == golden, f"the prompts of {name} changed; {RENEW}"


def test_every_golden_file_belongs_to_a_task():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(TASKS)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "tooluse"])  # whose prompts are published
def test_prompts_have_no_stray_space(name):
    for line in prompts(name).splitlines():
        assert line == line.rstrip(), line
    assert "\n\n\n" not in prompts(name)
