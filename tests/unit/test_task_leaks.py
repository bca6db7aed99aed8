"""What the views give away: no test question in any of them, no solution for the student, no own one in a context."""

import re
from collections import Counter
from pathlib import Path

import pytest
from task_rows import COS_E, DATA, DONORS, ROWS, write

from unisd_jax import preparation
from unisd_jax.config import load_config
from unisd_jax.data.loading import load_items, without_test_questions
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import get_task
from unisd_jax.data.tasks.base import identity
from unisd_jax.errors import UserError
from unisd_jax.inputs import read_inputs
from unisd_jax.preparation import training_views
from unisd_jax.teacher import student_messages
from unisd_jax.teacher.prompts import teacher_messages

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
MOST = 250  # training items of the real data
VIEWS = 4
TASKS = list(DONORS)
# The files of the published protocol and their splits where one file holds both sides.
REAL = {
    "mbpp": ("mbpp/train", "mbpp_sanitized/test", None, None),
    "tooluse": ("tooluse/train_small", "tooluse/test", None, None),
    "scienceqa": ("scienceqa/train", "scienceqa/test", None, None),
    "cos_e": ("cos_e/train", "cos_e/validation", None, None),
    "medmcqa": ("medmcqa/validation", "medmcqa/validation", "validation[:3000]", "validation[3000:]"),
    "gsm8k": ("gsm8k/train", "gsm8k/test", None, None),
}


# --- what may be found where ---


def words(text):
    return re.findall(r"\w+", text.casefold())


def written(messages):
    return "\n".join(message["content"] for message in messages)


def asked(item, task):
    """The words of what is asked, and those of its options, whose order and letters may be others elsewhere."""
    if task.family == "choice":
        options = item.details["options"]
        lettered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False))
        assert item.question.endswith(lettered)
        return words(item.question.removesuffix(lettered)), Counter(words(lettered))
    if task.name == "tooluse":
        return words(item.question.partition(": ")[2]), Counter()
    text = {"mbpp": item.same, "jsonl": item.prompt}.get(task.name, item.question)
    return words(text), Counter()


class Questions:
    """Finds questions in texts, word by word: case, marks and line breaks hide none."""

    def __init__(self, items, task):
        self.starts = {}
        for item in items:
            question, options = asked(item, task)
            self.starts.setdefault(tuple(question[:8]), []).append((item, question, options))
        self.lengths = {len(start) for start in self.starts}

    def asked_in(self, text):
        """The items that a text asks, once for every time that it does."""
        found, said, place = [], words(text), 0
        while place < len(said):
            here = {}
            for length in self.lengths:
                for item, question, options in self.starts.get(tuple(said[place : place + length]), ()):
                    end = place + len(question)
                    if said[place:end] == question and Counter(said[end : end + options.total()]) == options:
                        here[end + options.total()] = item
            # The longest: one question may be the beginning of another.
            place = max(here, default=place + 1)
            found += [here[place]] if here else []
        return found


def explanation(item, task):
    """What the gold reply says beside the answer; empty where that is too short to be told from chance."""
    text = item.completion
    if task.family == "choice" or task.name == "tooluse":
        text = text.split("\nAnswer: ")[0].removeprefix("Reasoning: ").split("\nAction: ")[0].removeprefix("Thought: ")
        text = "" if text == item.completion else text
    elif task.name == "gsm8k":
        text = text.rpartition("\n####")[0]
    elif task.family == "code":
        text = item.answer.partition(":\n")[2]
    return text if len(words(text)) >= 4 else ""


def shown_of_the_test(views, test, task):
    """The test items that a view asks, whatever the view."""
    questions = Questions(test, task)
    texts = {message["content"] for view in views for part in all_views(view) for message in part}
    return [item.id for text in texts for item in questions.asked_in(text)]


def all_views(view):
    return [part for part in (view.student, view.teacher, *view.contexts, view.negative) if part]


def told_student(items, views, task):
    """The items whose solution, or a part of it, their student's prompt holds."""
    told = []
    for item, view in zip(items, views, strict=True):
        text = written(view.student)
        parts = [item.completion, explanation(item, task), f"#### {item.answer}" if task.name == "gsm8k" else ""]
        # An explanation may quote the question or the lecture, which everybody sees.
        if any(part and part in text and part not in item.question for part in parts):
            told.append(item.id)
    return told


def told_contexts(items, views, task):
    """The items whose own solution an auxiliary view holds, or that are asked there as an example too."""
    questions, told = Questions(items, task), []
    for item, view in zip(items, views, strict=True):
        for context in view.contexts:
            text = written(context)
            found = [identity(other) for other in questions.asked_in(text)]
            asked_again = found.count(identity(item)) != 1 or len(found) != 2
            parts = [part for part in (item.completion, explanation(item, task)) if part]
            shown = [part for part in parts if part in text.replace(item.prompt, "")]
            # "Answer: B" is the reply to many questions; what no other item replies is the item's own.
            if asked_again or any(not is_said_by_others(part, item, items) for part in shown):
                told.append(item.id)
    return told


def is_said_by_others(part, item, items):
    return any(part in other.completion for other in items if identity(other) != identity(item))


def right_negatives(items, views, task, placement):
    """The items whose negative view shows a right reply, or in another way than a good one would be shown."""
    right = []
    for item, view in zip(items, views, strict=True):
        frame = teacher_messages(
            item.prompt, "<reply>", condition="gold", placement=placement, earlier=item.earlier
        )  # fmt: skip
        before, after = written(frame).rsplit("<reply>", 1)
        shown = written(view.negative)
        wrong = shown.removeprefix(before).removesuffix(after)
        if before + wrong + after != shown or task.grade(wrong, item)["exact"] == 1:
            right.append(item.id)
    return right


# --- the data ---


@pytest.fixture
def configure(tmp_path):
    def load(*overrides):
        usual = ("mode=custom", "model.path=none", f"teacher.cache_dir={tmp_path / 'cache'}")
        return load_config(BASE, [f"--{word}" for word in (*usual, *overrides)])

    return load


def disguised(name, row):
    """The same question in other words' clothing: case, white space, order of the options, id."""

    def louder(text):
        return "  ".join(text.upper().split(" ")) + "\n"

    fields = {"mbpp": ["text"], "tooluse": ["instruction", "name"], "jsonl": ["prompt"]}.get(name, ["question"])
    row = row | {field: louder(row[field]) for field in fields if field in row}
    if "messages" in row:
        row["messages"] = [message | {"content": louder(message["content"])} for message in row["messages"]]
    if "choices" in row:
        row["choices"] = [choice.upper() for choice in row["choices"][::-1]]
        gold = row["answer"]
        row["answer"] = gold.upper() if isinstance(gold, str) else len(row["choices"]) - 1 - gold
    if "opa" in row:
        row |= {f"op{one}": row[f"op{other}"].title() for one, other in zip("abcd", "dcba", strict=True)}
        row["cop"] = 3 - row["cop"]
    if "hint" in row:
        row["hint"] = louder(row["hint"]) if row["hint"] else row["hint"]
    return row | {field: "99" for field in ("id", "pid") if field in row} | {"task_id": 99, "upstream_index": 99}


def invented_files(name, folder):
    """Three training rows and the first one once more, and a test row that asks what the third one asks."""
    rows = [ROWS[name], *DONORS[name]]
    train, test = [*rows, disguised(name, rows[0])], disguised(name, rows[2])
    return [write(folder / "train.jsonl", *train), write(folder / "test.jsonl", test)]


@pytest.fixture(params=["invented", "real"])
def sides(request, name, tmp_path):
    """Training and test items of a task as a run has them; the invented test item asks what a training item asks."""
    task = get_task(name)
    if request.param == "invented":
        paths, splits = invented_files(name, tmp_path), [None, None]
    elif name == "jsonl":
        pytest.skip("jsonl has no published data")
    elif name == "short_answers":
        paths, splits = [None, None], [None, None]
    else:
        *files, first, second = REAL[name]
        paths, splits = [DATA / f"{file}.jsonl.gz" for file in files], [first, second]
        if not all(path.exists() for path in paths):
            pytest.skip(f"no benchmark data: {paths[0]} or {paths[1]} does not exist, UNISD_DATA names the folder")
    train, test = (
        load_items(task, side, place=Place(file=path), split=split).items
        for side, path, split in zip(("train", "test"), paths, splits, strict=True)
    )
    kept, shared = without_test_questions(train, test)
    if request.param == "invented":
        assert (len(kept), shared) == (3, 1)
    return kept[:MOST], test


def never():
    raise AssertionError("the weights were loaded")


def made_views(config, task, items):
    made = training_views(config, task, items, None, never)
    return made.items, made.views


@pytest.mark.parametrize(("method", "placement"), [("random", "turns"), ("retrieval", "inline")])
@pytest.mark.parametrize("name", TASKS)
def test_views_give_nothing_away(name, sides, method, placement, configure, monkeypatch):
    train, test = sides
    task = get_task(name)
    options = [
        "objective.agreement.level=token", f"teacher.contexts.num_auxiliary_contexts={VIEWS}", f"data.task={name}",
        f"teacher.contexts.method={method}", f"teacher.placement={placement}", "teacher.negatives.min_coverage=0",
    ]  # fmt: skip
    contrast = task.family != "code" and method == "retrieval"  # code would be run, and once is enough for the rest
    if contrast:
        options.append("objective.contrast.contrastive_weight=0.1")
    if task.family == "code":
        monkeypatch.setattr(preparation, "sound_items", lambda config, task, items, **_: list(items))
    items, views = made_views(configure(*options), task, train)
    assert len(items) >= 0.8 * len(train) > 1 and all(len(view.contexts) == VIEWS for view in views)
    assert shown_of_the_test(views, test, task) == []
    assert told_student(items, views, task) == []
    assert told_contexts(items, views, task) == []
    assert not contrast or right_negatives(items, views, task, placement) == []


# --- the checks notice what they are for ---


@pytest.fixture
def invented(name, tmp_path, configure):
    """A task, its invented training items with those that the test asks too, the test's, and the configuration."""
    task = get_task(name)
    train, test = (
        load_items(task, side, place=Place(file=path)).items
        for side, path in zip(("train", "test"), invented_files(name, tmp_path), strict=True)
    )
    config = configure(
        "objective.agreement.level=token", f"teacher.contexts.num_auxiliary_contexts={VIEWS}", f"data.task={name}"
    )
    return task, train, test, config


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch, request):
    if "invented" in request.fixturenames:
        monkeypatch.setattr(preparation, "sound_items", lambda config, task, items, **_: list(items))


@pytest.mark.parametrize("name", TASKS)
def test_a_test_question_among_the_training_items_is_noticed(name, invented):
    task, train, test, config = invented
    items, views = made_views(config, task, train)
    assert set(shown_of_the_test(views, test, task)) == {test[0].id}
    rest, views = made_views(config, task, without_test_questions(items, test)[0])
    assert len(rest) == 3 and shown_of_the_test(views, test, task) == []


@pytest.mark.parametrize("name", TASKS)
def test_a_solution_in_the_students_prompt_is_noticed(name, invented):
    task, train, _, config = invented
    items, views = made_views(config, task, train)
    for told in (lambda item: item.completion, lambda item: explanation(item, task)):
        leaking = [
            view._replace(student=student_messages(f"{item.prompt}\n{told(item)}"))
            for item, view in zip(items, views, strict=True)
        ]
        assert told_student(items, leaking, task) == [item.id for item in items if told(item)]


@pytest.mark.parametrize("name", TASKS)
def test_an_item_as_its_own_donor_is_noticed(name, invented, monkeypatch):
    task, train, _, config = invented

    def itself(questions, *, views, per_view, seed):
        return [[[item] * per_view] * views for item in range(len(questions))]

    monkeypatch.setattr(preparation, "random_donors", itself)
    items, views = made_views(config, task, train)
    assert set(told_contexts(items, views, task)) == {item.id for item in items}


@pytest.mark.parametrize("name", TASKS)
def test_a_duplicate_as_a_donor_is_noticed(name, invented, monkeypatch):
    task, train, _, config = invented
    twice = [train[0], train[3]]
    assert identity(twice[0]) == identity(twice[1])
    monkeypatch.setattr(preparation, "identity", lambda item: item.id)
    items, views = made_views(config, task, twice)
    assert set(told_contexts(items, views, task)) == {item.id for item in twice}


@pytest.mark.parametrize("name", ["scienceqa", "cos_e", "medmcqa", "gsm8k", "tooluse", "mbpp"])
def test_the_own_explanation_in_a_context_is_noticed(name, invented):
    task, train, _, config = invented
    items, views = made_views(config, task, train[:2])
    assert told_contexts(items, views, task) == []
    leaking = []
    for item, view in zip(items, views, strict=True):
        said = {"role": "user", "content": explanation(item, task)}
        leaking.append(view._replace(contexts=tuple([*context, said] for context in view.contexts)))
    assert set(told_contexts(items, leaking, task)) == {item.id for item in items}


@pytest.mark.parametrize("name", ["short_answers", "cos_e", "gsm8k", "tooluse"])
@pytest.mark.parametrize("placement", ["turns", "inline"])
def test_a_right_negative_is_noticed(name, placement, invented, configure):
    task, train, *_ = invented
    config = configure(
        f"data.task={name}", f"teacher.placement={placement}", "objective.contrast.contrastive_weight=0.1"
    )
    items, views = made_views(config, task, train)
    assert right_negatives(items, views, task, placement) == []
    right = [view._replace(negative=view.teacher) for view in views]
    assert right_negatives(items, right, task, placement) == [item.id for item in items]
    unlike = [view._replace(negative=[*view.negative, {"role": "user", "content": "Do better."}]) for view in views]
    assert right_negatives(items, unlike, task, placement) == [item.id for item in items]


# --- questions that both sides ask ---

LOOKS = {
    "case": lambda row: row | {"question": row["question"].upper(), "choices": list(map(str.title, row["choices"]))},
    "white space": lambda row: row | {"question": f" {row['question'].replace(' ', '  ')}\n"},
    "order": lambda row: row | {"choices": row["choices"][::-1]},
    "white space in options": lambda row: row | {"choices": [f" {text.replace(' ', '  ')}" for text in row["choices"]]},
}


@pytest.mark.parametrize("look", LOOKS)
def test_looks_hide_no_overlap(look, tmp_path):
    # In the order of their bytes "Deep water" comes first and "deep sea" second, in that of their words they do not.
    row = COS_E | {"choices": ["Deep water", "deep sea", "a pond", "Ice", "air"], "answer": "air"}
    other = LOOKS[look](row) | {"id": "other"}
    other["answer"] = next(text for text in other["choices"] if text.strip().casefold() == "air")
    different = row | {"id": "third", "choices": ["Deep water", "deep sea", "a pond", "Ice", "fire", "air"]}
    task = get_task("cos_e")
    train, test = (
        load_items(task, "test", place=Place(file=write(tmp_path / f"{name}.jsonl", *rows))).items
        for name, rows in (("train", [other, different]), ("test", [row]))
    )
    kept, shared = without_test_questions(train, test)
    assert [item.id for item in kept] == ["third"] and shared == 1


def test_a_whole_overlap_is_refused_by_name(configure, tmp_path):
    train, _ = invented_files("gsm8k", tmp_path)
    config = configure("data.task=gsm8k", f"data.train_path={train}", f"data.test_path={train}")
    with pytest.raises(UserError, match=r"every training item asks what a test item asks: set data\.") as error:
        read_inputs(config)
    assert "\n" not in str(error.value)
