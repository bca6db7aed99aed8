"""Rows of every task for the tests: invented ones in the published fields, and where the real ones lie."""

import gzip
import json
import os
from pathlib import Path

import pytest

from unisd_jax.data.loading import load_items
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import Form, get_task

DATA = Path(os.environ.get("UNISD_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")

MBPP = {
    "task_id": 7,
    "text": "Add one to a number.",
    "code": "def helper(x):\r\n    return x\r\ndef add_one(x):\r\n    return helper(x) + 1\r\n",
    "test_list": ["assert abs(add_one(1)) == 2", "assert (add_one(helper(2))) == 3"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "source_file": "sheet",
    "task_id": 8,
    "prompt": "Halve a number.",
    "code": "def half(x, by=2):\n    return x / by",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(half(3), 1.5)"],
}
COS_E = {
    "id": "a1",
    "question": "Where do fish live?",
    "choices": ["sky", "water", "sand", "water", "fire"],
    "answer": "water",
    "abstractive_explanation": "Fish breathe\n in water.",
    "extractive_explanation": "fish",
    "upstream_index": 0,
}
SCIENCEQA = {
    "question": "Which is a gas?",
    "choices": ["steam", "ice", "iron", "rock"],
    "answer": 0,
    "hint": "A kettle whistles.",
    "lecture": "Gases fill their container.",
    "solution": "Steam is water\nas a gas.",
    "pid": "31",
    "upstream_index": 0,
}
MEDMCQA = {
    "id": "m-1",
    "question": "Which vitamin prevents scurvy?",
    "opa": "Vitamin A",
    "opb": "Vitamin C",
    "opc": "Vitamin D",
    "opd": "Vitamin K",
    "cop": 1,
    "choice_type": "single",
    "exp": "Scurvy is a lack of ascorbic acid.",
    "subject_name": "Biochemistry",
    "topic_name": None,
    "upstream_index": 0,
}
GPQA = {
    "Record ID": "rec1",
    "Question": "Which number is even and prime?",
    "Correct Answer": "two",
    "Incorrect Answer 1": "three",
    "Incorrect Answer 2": "four",
    "Incorrect Answer 3": "five",
    "Explanation": "Two is divisible by one and itself only.",
    "High-level domain": "Mathematics",
}
GSM8K = {
    "question": "A box holds 12 pens. How many pens are in 3 boxes?",
    "answer": "There are 12 * 3 = <<12*3=36>>36 pens.\n#### 36",
    "upstream_index": 0,
}
HUMANEVAL = {
    "task_id": "Toy/0",
    "prompt": 'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
_TOOL = {"name": "Weather Desk", "description": "Forecasts.", "nl_documentation": "forecast: ..."}
TOOLUSE = _TOOL | {
    "prompt": (
        "Your task is to answer the question with a tool.\n\nweather desk has one action, forecast(city, days).\n\n"
        "Use the following format:\n\nThought: what to do\nAction: the action\nAction Input: its JSON\n\nBegin!\n\n"
        "Question: What will the weather be in Oslo for 3 days?\n"
    ),
    "instruction": "What will the weather be in Oslo for 3 days?",
    "golden_answer": [{"Action": "forecast", "Action_Input": '{"city": "Oslo", "days": 3}'}],
    "golden_response": [
        "Thought: The forecast of three days is asked for.",
        "Action: forecast",
        'Action Input: {"city": "Oslo", "days": 3}',
    ],
    "source": "invented",
    "upstream_index": 0,
}
JSONL = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And doubled?"},
    ],
    "reference": "8",
    "negative": "6",
    "privileged_context": "Twice four is eight.",
    "id": "doubled",
}
ROWS = {
    "short_answers": {"id": "s1", "question": "What is the opposite of hot?", "answer": "cold"},
    "jsonl": JSONL,
    "mbpp": MBPP,
    "tooluse": TOOLUSE,
    "scienceqa": SCIENCEQA,
    "cos_e": COS_E,
    "medmcqa": MEDMCQA,
    "gsm8k": GSM8K,
    "gpqa": GPQA,
    "humaneval": HUMANEVAL,
}

# Two further rows of every task that is trained on: the first row's donors.
DONORS = {
    "short_answers": [
        {"id": "s2", "question": "What colour is grass?", "answer": "green"},
        {"id": "s3", "question": "How many legs does a spider have?", "answer": "8"},
    ],
    "jsonl": [
        {"id": "sum", "prompt": "What is 3 + 4?", "reference": "Three and four make 7.", "negative": "They make 8."},
        {
            "id": "gas",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is helium a gas?"}],
            "reference": "Yes, at room temperature.",
            "negative": "No, it is a metal.",
        },
    ],
    "mbpp": [
        MBPP
        | {
            "task_id": 11,
            "text": "Write a function that counts the vowels of a word.",
            "code": "def vowels(word):\r\n    return sum(letter in 'aeiou' for letter in word)\r\n",
            "test_list": ["assert vowels('queue') == 4"],
        },
        MBPP
        | {
            "task_id": 12,
            "text": "Write a function that keeps the even numbers of a list.",
            "code": "def evens(numbers):\r\n    return [n for n in numbers if n % 2 == 0]\r\n",
            "test_list": ["assert evens([1, 2, 4]) == [2, 4]", "assert evens([]) == []"],
            "test_setup_code": "import math",
        },
    ],
    "tooluse": [
        TOOLUSE
        | {
            "prompt": TOOLUSE["prompt"].replace("in Oslo for 3 days", "in Rome for 5 days"),
            "instruction": "What will the weather be in Rome for 5 days?",
            "golden_answer": [{"Action": "forecast", "Action_Input": '{"city": "Rome", "days": 5}'}],
            "golden_response": [
                "Thought: Five days in Rome are asked for.",
                "Action: forecast",
                'Action Input: {"city": "Rome", "days": 5}',
            ],
            "upstream_index": 1,
        },
        TOOLUSE
        | {
            "prompt": TOOLUSE["prompt"].replace("What will the weather be in Oslo for 3 days", "Is Lima or Quito wet"),
            "instruction": "Is Lima or Quito wet?",
            "golden_answer": [
                {"Action": "forecast", "Action_Input": '{"city": "Lima"}'},
                {"Action": "forecast", "Action_Input": '{"city": "Quito"}'},
            ],
            "golden_response": [],
            "upstream_index": 2,
        },
    ],
    "scienceqa": [
        SCIENCEQA
        | {
            "question": "Which animal lays eggs?",
            "choices": ["cow", "hen"],
            "answer": 1,
            "hint": "",
            "lecture": "Birds hatch from eggs.",
            "solution": "A hen is a bird.",
            "pid": "32",
            "upstream_index": 1,
        },
        SCIENCEQA
        | {
            "question": "Is glass a solid?",
            "choices": ["yes", "no"],
            "answer": 0,
            "hint": "A window keeps its shape.",
            "lecture": "",
            "solution": "",
            "pid": "33",
            "upstream_index": 2,
        },
    ],
    "cos_e": [
        COS_E
        | {
            "id": "a2",
            "question": "What do bees make?",
            "choices": ["honey", "bread", "glass", "wool", "ink"],
            "answer": "honey",
            "abstractive_explanation": "bees turn nectar into honey",
            "upstream_index": 1,
        },
        COS_E
        | {
            "id": "a3",
            "question": "Where would one keep milk cold?",
            "choices": ["oven", "roof", "fridge", "drawer", "garden"],
            "answer": "fridge",
            "abstractive_explanation": "a fridge is cold inside",
            "upstream_index": 2,
        },
    ],
    "medmcqa": [
        MEDMCQA
        | {
            "id": "m-2",
            "question": "Which organ makes insulin?",
            "opa": "Pancreas",
            "opb": "Liver",
            "opc": "Spleen",
            "opd": "Kidney",
            "cop": 0,
            "exp": "Its beta cells release the hormone.",
            "upstream_index": 1,
        },
        MEDMCQA
        | {
            "id": "m-3",
            "question": "Which bone is the longest?",
            "opa": "Tibia",
            "opb": "Ulna",
            "opc": "Femur",
            "opd": "Fibula",
            "cop": 2,
            "exp": None,
            "upstream_index": 2,
        },
    ],
    "gsm8k": [
        {
            "question": "Ann reads 20 pages a day. How many pages does she read in 5 days?",
            "answer": "She reads 20 * 5 = <<20*5=100>>100 pages.\n#### 100",
            "upstream_index": 1,
        },
        {
            "question": "A shirt of $1,500 is sold at half its price. What does it cost?",
            "answer": "Half of $1,500 is $<<1500/2=750>>750.\nSo it costs $750.\n#### 750",
            "upstream_index": 2,
        },
    ],
}


def real(name):
    """The file of real rows, or a skip where there is none."""
    path = DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no benchmark data: {path} does not exist, UNISD_DATA names the folder")
    return path


def write(path, *rows):
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def load(name, path=None, side="test", **form):
    """The items of one file; None: the task's own."""
    return load_items(get_task(name), side, place=Place(file=path), form=Form(**form)).items


def without(row, *names):
    return {key: value for key, value in row.items() if key not in names}
