"""The record cache survives a kill at any byte, tells damage from a torn end, and has one builder at a time."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisd_jax.errors import UserError
from unisd_jax.teacher import cache as cache_module
from unisd_jax.teacher.cache import cache_folder, open_cache, stale, text_hash
from unisd_jax.teacher.weights_hash import weights_hash

KEY = {"model": "ab12", "seed": 0, "options": {"temperature": 0.7}}
ANY_TEXT = st.text(st.characters())  # lone surrogates too: JSON data may hold them
RECORDS = {"item-1": ["wrong", "falsch"], "item-2": [], "item-ü": ["line\u2028separator\n"]}


def build(root, records=RECORDS, key=KEY):
    with open_cache(root, "negatives", key, len(records)) as cache:
        cache.add(records)
        cache.finish()
    return cache


def reopen(root, key=KEY, total=3):
    return open_cache(root, "negatives", key, total)


def test_a_finished_cache_is_read_back(tmp_path):
    built = build(tmp_path)
    assert built.complete
    first, second = reopen(tmp_path), reopen(tmp_path)
    assert first.complete and second.complete, "any number may read it"
    assert first.records == second.records == RECORDS
    assert built.folder == tmp_path / "negatives" / built.folder.name and len(built.folder.name) == 16
    assert json.loads((built.folder / "key.json").read_text()) == KEY
    with pytest.raises(ValueError, match="complete or closed"):
        first.add({"item-4": []})


def test_the_order_of_the_key_does_not_matter_and_its_values_do(tmp_path):
    assert cache_folder(tmp_path, "a", KEY) == cache_folder(tmp_path, "a", dict(reversed(KEY.items())))
    assert cache_folder(tmp_path, "a", KEY) != cache_folder(tmp_path, "a", KEY | {"seed": 1})


def test_an_unfinished_cache_is_resumed(tmp_path):
    with reopen(tmp_path) as cache:
        cache.add({"item-1": ["wrong"]})
    assert not cache.complete
    with reopen(tmp_path) as cache:
        assert cache.records == {"item-1": ["wrong"]} and not cache.complete
        with pytest.raises(ValueError, match="holds 1 records, expected 3"):
            cache.finish()
        cache.add({"item-2": [], "item-3": None})
        cache.finish()
    assert reopen(tmp_path).records == {"item-1": ["wrong"], "item-2": [], "item-3": None}


def test_a_kill_at_any_byte_loses_the_torn_record_only(tmp_path):
    with reopen(tmp_path) as cache:
        cache.add(RECORDS)
    file = cache.folder / "records.jsonl"
    data = file.read_bytes()
    for length in range(len(data) + 1):
        file.write_bytes(data[:length])
        with reopen(tmp_path) as cache:
            whole = data[:length].count(b"\n")
            assert list(cache.records.items()) == list(RECORDS.items())[:whole]
            cache.add({name: value for name, value in RECORDS.items() if name not in cache.records})
            assert cache.records == RECORDS
        assert file.read_bytes() == data
    assert not list(tmp_path.rglob("*.damaged*"))


def test_a_kill_before_anything_was_written(tmp_path):
    folder = cache_folder(tmp_path, "negatives", KEY)
    folder.mkdir(parents=True)
    with reopen(tmp_path) as cache:
        assert cache.records == {} and (folder / "key.json").exists()
    assert not list(tmp_path.rglob("*.damaged*"))


def break_records(folder):
    data = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(data.replace(b"wrong", b"right"))


def shorten_records(folder):
    os.truncate(folder / "records.jsonl", 20)


def break_manifest(folder):
    (folder / "manifest.json").write_text("{")


def break_middle(folder):
    (folder / "manifest.json").unlink()
    data = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(b"\0" + data[1:])


def foreign_record(folder):
    (folder / "manifest.json").unlink()
    (folder / "records.jsonl").write_text('["item-1", 3]\n')


def other_key(folder):
    (folder / "key.json").write_text("{}")


def no_key(folder):
    (folder / "key.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_records, "manifest.json says"),
        (shorten_records, "manifest.json says"),
        (break_manifest, "manifest.json: not JSON"),
        (break_middle, "records.jsonl, line 1: not JSON"),
        (foreign_record, "records.jsonl, line 1: not a record"),
        (other_key, "key.json is not the key"),
        (no_key, "key.json: not JSON"),
    ],
)
def test_a_damaged_cache_is_moved_aside_and_begun_afresh(tmp_path, capsys, damage, message):
    folder = build(tmp_path).folder
    damage(folder)
    left = sorted(path.name for path in folder.iterdir())
    with reopen(tmp_path) as cache:
        assert cache.records == {} and not cache.complete
    aside = folder.with_name(f"{folder.name}.damaged")
    assert sorted(path.name for path in aside.iterdir()) == left, "nothing is thrown away"
    (line,) = capsys.readouterr().out.splitlines()
    assert message in line and aside.name in line
    # And once more, beside the first.
    damage(build(tmp_path).folder)
    reopen(tmp_path).close()
    assert folder.with_name(f"{folder.name}.damaged-2").is_dir()


def test_a_finished_cache_of_another_size_is_not_taken(tmp_path, capsys):
    build(tmp_path)
    with reopen(tmp_path, total=4) as cache:
        assert not cache.complete
    assert "'count': 3" in capsys.readouterr().out


def test_one_builder_at_a_time_and_the_others_take_what_it_made(tmp_path):
    program = (
        "import sys\nfrom unisd_jax.teacher.cache import open_cache\n"
        f"with open_cache(sys.argv[1], 'negatives', {KEY!r}, {len(RECORDS)}) as cache:\n"
        "    print('complete' if cache.complete else 'unfinished', sorted(cache.records))"
    )
    with reopen(tmp_path) as cache:
        second = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], text=True, stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"},
        )  # fmt: skip
        line = second.stdout.readline()
        assert line == f"waiting for process {os.getpid()}, which is making cache {cache.folder}\n"
        other = open_cache(tmp_path, "negatives", KEY | {"seed": 1}, 1)  # another cache is free
        other.close()
        assert second.poll() is None
        cache.add(RECORDS)
        cache.finish()
    out, _ = second.communicate(timeout=60)
    assert out == f"complete {sorted(RECORDS)}\n"


def test_a_killed_builder_leaves_no_lock(tmp_path):
    program = (
        "import os, sys\nfrom unisd_jax.teacher.cache import open_cache\n"
        f"cache = open_cache(sys.argv[1], 'negatives', {KEY!r}, 3)\ncache.add({{'item-1': []}})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == -9
    with reopen(tmp_path) as cache:
        assert cache.records == {"item-1": []}


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with reopen(tmp_path) as cache:
        cache.add({"item-1": ["wrong"]})

        def fail(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(cache_module.os, "fsync", fail)
            with pytest.raises(OSError, match="No space"):
                cache.add({"item-2": ["falsch"]})
        cache.add({"item-3": []})
    with reopen(tmp_path) as cache:
        assert cache.records == {"item-1": ["wrong"], "item-3": []}


def test_a_value_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with reopen(tmp_path) as cache:
        with pytest.raises(ValueError, match="not JSON compliant"):
            cache.add({"item-1": 1.0, "item-2": float("nan")})
        assert cache.records == {}
    assert reopen(tmp_path).records == {}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.dictionaries(ANY_TEXT, st.lists(ANY_TEXT), max_size=4))
def test_whatever_is_added_comes_back(tmp_path, records):
    key = {"records": records}
    if not cache_folder(tmp_path, "negatives", key).exists():
        build(tmp_path, records, key)
    assert reopen(tmp_path, key, len(records)).records == records


def test_stale_says_what_differs_from_the_most_similar_cache(tmp_path):
    assert stale(tmp_path, "negatives", KEY) == ""
    build(tmp_path, key={"model": "cd34", "seed": 7, "options": {"temperature": 1.0}})
    build(tmp_path, key={"model": "cd34", "seed": 0, "options": {"temperature": 0.7}, "extra": "x" * 64})
    line = stale(tmp_path, "negatives", KEY)
    assert line == "extra: xxxxxxxxxxxx... -> none, model: cd34 -> ab12"
    assert stale(tmp_path, "induction", KEY) == "", "another kind is no reason"
    build(tmp_path)
    assert stale(tmp_path, "negatives", KEY) == line, "its own folder is none either"


def test_stale_passes_over_what_it_cannot_read(tmp_path):
    folder = build(tmp_path, key={"model": "cd34"}).folder
    os.replace(folder, folder.with_name(f"{folder.name}.damaged"))
    other = build(tmp_path, key={"model": "ef56"}).folder
    (other / "key.json").write_text("{")
    assert stale(tmp_path, "negatives", KEY) == ""


def test_text_hash_tells_where_a_text_ends():
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"]) != text_hash(["a\nbc"])
    assert text_hash([["a", "b"]]) != text_hash(["a", "b"])
    assert text_hash(iter(["ü"])) == text_hash(["ü"])


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model-1.safetensors").write_bytes(b"weights")
    return path


def test_the_hash_of_weights_follows_their_content(tmp_path, checkpoint):
    memo = tmp_path / "memo"
    first = weights_hash(checkpoint, memo)
    (checkpoint / "notes.txt").write_text("not a weight")
    assert weights_hash(checkpoint, memo) == first
    os.utime(checkpoint / "config.json", ns=(1, 1))
    assert weights_hash(checkpoint, memo) == first, "the same content at another time"
    (checkpoint / "model-1.safetensors").write_bytes(b"WEIGHTS")
    changed = weights_hash(checkpoint, memo)
    assert changed != first
    os.rename(checkpoint, tmp_path / "moved")
    assert weights_hash(tmp_path / "moved", memo) == changed, "wherever they lie"
    (tmp_path / "moved" / "model-2.safetensors").write_bytes(b"")
    assert weights_hash(tmp_path / "moved", memo) != changed


def test_a_file_is_read_once(tmp_path, checkpoint, monkeypatch):
    memo = tmp_path / "memo"
    first = weights_hash(checkpoint, memo)
    with monkeypatch.context() as patch:
        patch.setattr("unisd_jax.teacher.weights_hash._file_hash", lambda file: pytest.fail(f"{file} is read again"))
        assert weights_hash(checkpoint, memo) == first
    (memo_file,) = memo.iterdir()
    memo_file.write_text("[1")
    assert weights_hash(checkpoint, memo) == first, "a damaged memo is made again"


@pytest.mark.parametrize("missing", ["config.json", "model-1.safetensors"])
def test_a_folder_that_is_no_checkpoint(tmp_path, checkpoint, missing):
    (checkpoint / missing).unlink()
    with pytest.raises(UserError, match="model.path: .* is not a checkpoint, expected config.json and"):
        weights_hash(checkpoint, tmp_path / "memo")
