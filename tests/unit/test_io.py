"""Files that are whole or not there, and keys that are told apart by seed, step and purpose."""

import itertools
import json
import os

import jax
import pytest

from unisd_jax.io import replaced_folder, write_bytes_atomic, write_json_atomic, write_text_atomic
from unisd_jax.random import PURPOSES, purpose_key


def test_text_is_written_as_utf8(tmp_path):
    path = tmp_path / "new" / "folders" / "note.txt"
    write_text_atomic(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert os.listdir(path.parent) == ["note.txt"]


def test_json_is_sorted_and_ends_with_a_newline(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"b": 1.5, "a": None})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": None, "b": 1.5}
    assert text.index('"a"') < text.index('"b"') and text.endswith("}\n")


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    write_bytes_atomic(path, b"a long old content")
    write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: (calls.append("fsync"), fsync(*args)))
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    write_bytes_atomic(tmp_path / "file", b"x")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_what_json_does_not_have(tmp_path, value):
    path = tmp_path / "metrics.json"
    write_json_atomic(path, {"loss": 1.0})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"loss": [value]})
    assert json.loads(path.read_text()) == {"loss": 1.0} and os.listdir(tmp_path) == ["metrics.json"]


def test_keys_differ_by_seed_step_and_purpose():
    keys = [
        tuple(jax.random.key_data(purpose_key(seed, step, purpose)).tolist())
        for seed, step, purpose in itertools.product((0, 1), (0, 1, 2), PURPOSES)
    ]
    assert len(set(keys)) == len(keys) == 6 * len(PURPOSES)


def test_a_key_needs_no_memory():
    first, again = (jax.random.key_data(purpose_key(7, 123, "rollout")) for _ in range(2))
    assert first.tolist() == again.tolist()


def test_an_unknown_purpose():
    with pytest.raises(ValueError):
        purpose_key(0, 0, "rollouts")


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for text in ("first", "second"):
        with replaced_folder(target) as folder:
            (folder / text).write_text(text)
        assert [path.name for path in target.iterdir()] == [text]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_whose_filling_fails_stays_as_it_was(tmp_path):
    target = tmp_path / "out"
    with replaced_folder(target) as folder:
        (folder / "good").write_text("good")
    with pytest.raises(OSError), replaced_folder(target) as folder:
        (folder / "bad").write_text("bad")
        raise OSError("disk full")
    assert [path.name for path in target.iterdir()] == ["good"]
    with replaced_folder(target) as folder:
        assert not list(folder.iterdir()), "what a failure left behind is not taken over"
