"""Where rows come from: files, folders in several layouts, the hub and tensorflow-datasets (both stood in for here)."""

import json
import sys
import types

import pytest
from task_rows import COS_E, DATA, GPQA, GSM8K, MBPP, MBPP_SANITIZED, MEDMCQA, SCIENCEQA, load, without, write

from unisd_jax.data import sources
from unisd_jax.data.loading import load_items, without_test_questions
from unisd_jax.data.rows import read_rows
from unisd_jax.data.sources import Place, parse_split
from unisd_jax.data.tasks import TASKS, Form, Source, get_task
from unisd_jax.errors import ConfigError, UserError

MBPP_TASK, GSM8K_TASK, COS_E_TASK = (get_task(name) for name in ("mbpp", "gsm8k", "cos_e"))


def gsm8k_rows(count):
    row = without(GSM8K, "upstream_index")
    return [row | {"question": f"{row['question']} ({number})"} for number in range(count)]


# --- splits ---


@pytest.mark.parametrize(
    ("text", "name", "rows"),
    [
        ("train", "full/train", slice(None, None)),
        ("sanitized/test", "sanitized/test", slice(None, None)),
        ("sanitized/train[:100]", "sanitized/train", slice(None, 100)),
        ("validation[20:]", "full/validation", slice(20, None)),
        ("full/train[5:7]", "full/train", slice(5, 7)),
    ],
)
def test_splits(text, name, rows):
    assert parse_split(text, MBPP_TASK, "data.train_split") == (name, rows)


@pytest.mark.parametrize("text", ["", "train[", "train[1]", "a/b/c", "train[-1:]", "train[1:2:3]", " train"])
def test_a_split_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match="data.train_split is .* expected a split such as"):
        parse_split(text, MBPP_TASK, "data.train_split")


def test_an_unknown_config_is_refused():
    with pytest.raises(
        ConfigError, match="data.test_split is 'clean/test'; task 'mbpp' has the configs 'full', 'sanit"
    ):
        parse_split("clean/test", MBPP_TASK, "data.test_split")


def test_training_on_an_evaluation_set_is_refused():
    for name in ("gpqa", "humaneval"):
        with pytest.raises(ConfigError, match=f"'{name}' is for evaluation only and never trained on"):
            load_items(get_task(name), "train", place=Place(path=DATA))


def test_a_form_that_a_task_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="data.form.answer is letter; task 'gsm8k' has free, json"):
        load_items(GSM8K_TASK, "test", form=Form(answer="letter"))


# --- files and folders ---


def test_folders_in_all_layouts(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = sys.modules["pyarrow"].Table.from_pylist(gsm8k_rows(3))
    layouts = {
        "flat": lambda folder: write(folder / "test.jsonl", *gsm8k_rows(3)),
        "named": lambda folder: write(folder / "gsm8k" / "test.jsonl.gz", *gsm8k_rows(3)),
        "config": lambda folder: write(folder / "main" / "test.jsonl", *gsm8k_rows(3)),
        "table": lambda folder: parquet.write_table(table, folder / "gsm8k" / "test.parquet"),
        "hub": lambda folder: parquet.write_table(table, folder / "main" / "test-00000-of-00001.parquet"),
    }
    for name, fill in layouts.items():
        for part in ("gsm8k", "main"):
            (tmp_path / name / part).mkdir(parents=True)
        fill(tmp_path / name)
        loaded = load_items(GSM8K_TASK, "test", place=Place(path=tmp_path / name))
        assert [item.answer for item in loaded.items] == ["36"] * 3, name
        assert "3 rows of the 1319 published" in loaded.note
    assert "small" in load_small(tmp_path).note


def load_small(folder):
    """A file that says it is a part of the split."""
    (folder / "part").mkdir()
    write(folder / "part" / "train_small.jsonl", *gsm8k_rows(2))
    return load_items(GSM8K_TASK, "train", place=Place(path=folder / "part"))


def test_the_files_of_one_config_are_never_taken_for_another(tmp_path):
    """MBPP is trained on one config and tested on the other; a folder with loose files is that of its name."""
    folder = tmp_path / "mbpp"
    folder.mkdir()
    write(folder / "train.jsonl", MBPP)
    write(folder / "test.jsonl", MBPP)
    assert len(load_items(MBPP_TASK, "train", place=Place(path=folder)).items) == 1
    with pytest.raises(UserError, match="data.path: found no test file .* data.test_split names another split"):
        load_items(MBPP_TASK, "test", place=Place(path=folder))
    assert len(load_items(MBPP_TASK, "test", place=Place(path=folder), split="full/test").items) == 1
    (tmp_path / "mbpp_sanitized").mkdir()
    write(tmp_path / "mbpp_sanitized" / "test.jsonl", MBPP_SANITIZED)
    assert load_items(MBPP_TASK, "test", place=Place(path=tmp_path)).items[0].id == "mbpp-8"


def test_a_missing_shard_is_noticed(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = sys.modules["pyarrow"].Table.from_pylist(gsm8k_rows(1))
    parquet.write_table(table, tmp_path / "test-00000-of-00002.parquet")
    with pytest.raises(UserError, match="found 1 of the 2 files"):
        load_items(GSM8K_TASK, "test", place=Place(path=tmp_path))


def test_damaged_and_missing_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but nothing else")
    with pytest.raises(UserError, match=r"bad\.parquet is not a parquet file"):
        read_rows(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"none\.parquet does not exist"):
        read_rows(tmp_path / "none.parquet")


def test_a_path_that_is_no_folder(tmp_path):
    file = write(tmp_path / "rows.jsonl", GSM8K)
    for path, kind in ((file, "a file"), (tmp_path / "none", "not there")):
        with pytest.raises(UserError, match=f"data.path: .* is {kind}, expected a folder; data.train_path names one"):
            load_items(GSM8K_TASK, "train", place=Place(path=path))


def test_a_part_of_a_split_has_the_ids_and_orders_of_the_whole(tmp_path):
    rows = [without(COS_E, "upstream_index") | {"id": f"row {number}"} for number in range(20)]
    image = without(SCIENCEQA, "upstream_index", "pid") | {"image": {"bytes": ""}}
    science = [without(SCIENCEQA, "upstream_index", "pid"), image] * 10
    for name, given in (("cos_e", rows), ("scienceqa", science), ("gsm8k", gsm8k_rows(20))):
        path = write(tmp_path / f"{name}.jsonl", *given)
        task, place = get_task(name), Place(file=path)
        whole = load_items(task, "train", place=place).items
        part = load_items(task, "train", place=place, split="train[5:15]").items
        assert len(part) in (5, 10) and part == [item for item in whole if item in part]
        assert load_items(task, "train", place=place, limit=3).items == whole[:3]
        with pytest.raises(UserError, match="no item is left of 20 rows"):
            load_items(task, "train", place=place, split="train[20:]")


def test_what_is_left_out_is_counted(tmp_path):
    image = without(SCIENCEQA, "pid") | {"image": {"bytes": ""}}
    path = write(tmp_path / "rows.jsonl", SCIENCEQA, image, image)
    note = load_items(get_task("scienceqa"), "train", place=Place(file=path)).note
    assert note == f"train: 1 items of scienceqa train from {path} (3 rows, 2 left out: with an image)"


def test_training_items_that_test_items_ask_too_are_left_out(tmp_path):
    other = COS_E | {"id": "b", "question": "Where  do FISH live?", "choices": COS_E["choices"][::-1]}
    third = COS_E | {"id": "c", "choices": ["sky", "water", "sand", "lava", "fire"]}
    train = load("cos_e", write(tmp_path / "train.jsonl", other, third), side="train")
    test = load("cos_e", write(tmp_path / "test.jsonl", COS_E))
    kept, shared = without_test_questions(train, test)
    assert [item.id for item in kept] == ["c"] and shared == 1


# --- the hub ---


class Table(list):
    """What `datasets.load_dataset` returns, as far as it is used."""

    features = {}

    def __init__(self, rows, copies=()):
        super().__init__(rows)
        self.cache_files = [{"filename": name} for name in copies]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: `hub.answer` is what loading gives, `hub.asked` what it was asked for."""
    module = types.SimpleNamespace(answer=None, asked=[], Image=type("Image", (), {}))

    def load_dataset(*where, split, revision):
        module.asked.append((*where, split, revision))
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_the_hub_is_asked_for_the_pinned_revision(hub):
    hub.answer = Table(gsm8k_rows(1319))
    loaded = load_items(GSM8K_TASK, "test")
    assert hub.asked == [("openai/gsm8k", "main", "test", "740312add88f781978c0658806c59bc2815b9866")]
    assert len(loaded.items) == 1319 and "from hub openai/gsm8k at 740312add88f (1319 rows)" in loaded.note


def test_a_split_of_another_size_is_refused_unless_another_revision_is_asked_for(hub):
    hub.answer = Table(gsm8k_rows(1318))
    with pytest.raises(UserError, match="split main/test has 1318 rows, expected 1319"):
        load_items(GSM8K_TASK, "test")
    assert len(load_items(GSM8K_TASK, "test", place=Place(revision="abc")).items) == 1318
    assert hub.asked[-1][-1] == "abc"


def test_a_copy_of_another_revision_is_refused(hub):
    hub.answer = Table(gsm8k_rows(1319), ["/copies/main/0.0.0/e53f048856ff/test.arrow"])
    with pytest.raises(UserError, match="found a copy of another revision"):
        load_items(GSM8K_TASK, "test")
    hub.answer = Table(gsm8k_rows(1319), [f"/copies/main/0.0.0/{GSM8K_TASK.source.revision}/test.arrow"])
    assert load_items(GSM8K_TASK, "test").items


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it\nmore"), FileNotFoundError("gated dataset"), ValueError("")]
)
def test_what_goes_wrong_at_the_hub_is_one_line(hub, error):
    hub.answer = error
    with pytest.raises(UserError, match="split main/test cannot be loaded .* set data.path to a folder") as caught:
        load_items(GSM8K_TASK, "test")
    assert "\n" not in str(caught.value)


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the extra \[hub\]: pip install 'unisd_jax\[hub\]'; or set data.path"):
        load_items(GSM8K_TASK, "test")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"data.source is tfds, which needs the extra \[hub\]"):
        load_items(GSM8K_TASK, "test", place=Place(origin="tfds"))


def test_a_bad_row_of_the_hub_is_named(hub):
    hub.answer = Table([MEDMCQA | {"id": str(number), "cop": -1} for number in range(4183)])
    with pytest.raises(UserError, match="openlifescienceai/medmcqa validation, row 1: field 'cop' is -1"):
        load_items(get_task("medmcqa"), "test")


def test_gpqa_has_one_split_in_three_configs(hub):
    hub.answer = Table([GPQA | {"Record ID": f"rec{number}"} for number in range(198)])
    assert len(load_items(get_task("gpqa"), "test", split="gpqa_diamond/train").items) == 198
    assert hub.asked[-1][:3] == ("Idavidrein/gpqa", "gpqa_diamond", "train")


def test_every_source_is_pinned_as_far_as_it_is_known():
    for name, task in TASKS.items():
        if task.source is None:
            continue
        assert name == "tooluse" or len(task.source.revision) == 40
        for split in filter(None, (task.train, task.test)):
            assert split in task.source.sizes, (name, split)
        assert {split.rpartition("/")[0] for split in task.source.sizes} == set(task.source.folders)


# --- tensorflow-datasets ---


@pytest.fixture
def tfds(monkeypatch):
    import numpy as np

    def data_source(builder, split):
        assert (builder, split) == ("gsm8k:1.0.0", "test")
        fields = [
            {"question": row["question"].encode(), "answer": np.bytes_(row["answer"])} for row in gsm8k_rows(1319)
        ]
        return fields

    module = types.ModuleType("tensorflow_datasets")
    module.data_source = data_source
    module.text = types.ModuleType("tensorflow_datasets.text")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.text", module.text)


def test_rows_of_tensorflow_datasets(tfds):
    loaded = load_items(GSM8K_TASK, "test", place=Place(origin="tfds"))
    assert loaded.items[5].question == f"{GSM8K['question']} (5)" and "tensorflow-datasets gsm8k:1.0.0" in loaded.note
    with pytest.raises(UserError, match="tensorflow-datasets has nothing of task 'mbpp'; set data.source=auto"):
        load_items(MBPP_TASK, "train", place=Place(origin="tfds"))
    with pytest.raises(UserError, match="has only 'v1.11/train', 'v1.11/validation' of task 'cos_e'"):
        load_items(COS_E_TASK, "train", place=Place(origin="tfds"), split="v1.0/train")


def test_values_become_those_of_json():
    import numpy as np

    given = {"a": b"x", "b": [b"y", np.int64(3)], "c": {"d": np.array(["z"], object)}, "e": 1.5}
    assert json.loads(json.dumps(sources.plain(given))) == {"a": "x", "b": ["y", 3], "c": {"d": ["z"]}, "e": 1.5}


# --- a task of the user's own ---


def test_own_tasks(tmp_path):
    for text, message in (
        ("", "has no TASK that is a unisd_jax.data.tasks.Task, found None"),
        ("TASK = 3", "has no TASK .* found 3"),
        ("import nothing_of_this_name", "cannot be run .ModuleNotFoundError"),
        ("def f(:", "cannot be run .SyntaxError"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ConfigError, match=f"data.task: .*mine.py {message}"):
            get_task(str(tmp_path / "mine.py"))
    with pytest.raises(ConfigError, match="the file .*none.py does not exist"):
        get_task(str(tmp_path / "none.py"))


def test_a_source_of_ones_own(hub, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from unisd_jax.data.tasks import Item, Source, Task\n"
        "def make(row, position, form):\n"
        "    return Item(f'at-{position}', row.text('q'), row.text('a'), row.text('a'))\n"
        "TASK = Task('mine', make, lambda text, item: {'exact': float(text == item.answer)},"
        " source=Source('me/mine', 'f' * 40, {'train': 2}, {'': ('mine',)}))\n"
    )
    task = get_task(str(tmp_path / "mine.py"))
    assert isinstance(task.source, Source)
    hub.answer = Table([{"q": "a?", "a": "b"}, {"q": "c?", "a": "d"}])
    assert [item.id for item in load_items(task, "train").items] == ["at-0", "at-1"]
    assert hub.asked == [("me/mine", None, "train", "f" * 40)]
