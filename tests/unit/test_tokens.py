"""Tables of token ids: exact in memory and on disk, whatever lies in the folder, however many make it together."""

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisd_jax.data import tokens
from unisd_jax.data.tokens import build_table, remove_old

NAMES = ("student", "gold")
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


def numbered(row: int) -> list[list[int]]:
    """The ids of one row of `build`."""
    return [[row] * (row % 3), [row, row + 1]]


class Maker:
    """Makes the rows of `numbered` and remembers which; with `rows`, those."""

    def __init__(self, rows=None):
        self.rows, self.made = rows, []

    def __call__(self, wanted: range) -> list[list[np.ndarray]]:
        self.made += list(wanted)
        found = [numbered(row) if self.rows is None else self.rows[row] for row in wanted]
        return [[np.array(row[column], np.int32) for row in found] for column in range(len(found[0]))]


def contents(table) -> list[list[list[int]]]:
    return [[table.segment(row, name).tolist() for name in table.names] for row in range(len(table))]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Four rows in each part."""
    monkeypatch.setattr(tokens, "PART_ROWS", 4)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a table of ten rows, three parts."""
    path = tmp_path / ("a" * 64)
    build_table(NAMES, 10, Maker(), folder=path)
    return path


TEN = [numbered(row) for row in range(10)]


# --- Exact ---


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(IDS, min_size=width, max_size=width), max_size=11)),
    st.integers(1, 3),
)
def test_a_table_is_exact_in_memory_and_on_disk(tmp_path, rows, part_rows):
    names = [f"segment-{number}" for number in range(len(rows[0]) if rows else 2)]
    shutil.rmtree(tmp_path / "table", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PART_ROWS", part_rows)
        for folder in (None, tmp_path / "table", tmp_path / "table"):
            table = build_table(names, len(rows), Maker(rows), folder=folder)
            assert len(table) == len(rows) and contents(table) == rows
            assert table.lengths.shape == (len(rows), len(names)) and table.lengths.dtype == np.int32
            assert table.lengths.tolist() == [[len(ids) for ids in row] for row in rows]


def test_ids_are_int32_and_read_only(folder):
    for table in (build_table(NAMES, 10, Maker()), build_table(NAMES, 10, Maker(), folder=folder)):
        ids = table.segment(9, "gold")
        assert type(ids) is np.ndarray and ids.dtype == np.int32 and not ids.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1


def test_what_is_on_disk_is_mapped_not_read(folder):
    table = build_table(NAMES, 10, Maker(), folder=folder)
    base = table.segment(0, "gold")
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert type(base).__name__ == "mmap"


def test_large_tables_have_few_parts(tmp_path, monkeypatch):
    """Every mapped part keeps a file open."""
    monkeypatch.setattr(tokens, "MOST_PARTS", 2)
    table = build_table(NAMES, 21, Maker(), folder=tmp_path / "table")
    assert len(list((tmp_path / "table").iterdir())) == 2
    assert contents(table) == [numbered(row) for row in range(21)]


def test_a_second_run_makes_nothing(folder, capsys):
    maker = Maker()
    assert contents(build_table(NAMES, 10, maker, folder=folder)) == TEN
    assert maker.made == [] and capsys.readouterr().out == ""


def test_what_was_made_is_said_where_it_is_more_than_one_part(tmp_path, capsys):
    build_table(NAMES, 4, Maker(), folder=tmp_path / "one")
    assert capsys.readouterr().out == ""
    build_table(NAMES, 10, Maker(), folder=tmp_path / "three")
    assert capsys.readouterr().out.startswith("tokenised 10 of 10 items in ")


# --- Damage ---


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


DAMAGE = {
    "empty": lambda data: b"",
    "cut": cut,
    "a word cut off": lambda data: data[:-4],
    "a byte cut off": lambda data: data[:-1],
    "only its beginning": lambda data: data[:20],
    "more after its end": lambda data: data + bytes(4),
    "a bit flipped": flipped,
    "other bytes": lambda data: b"not an array at all",
    "a huge number of rows": lambda data: b"\xff\xff\xff\x7f" + data[4:],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_made_again(folder, damage, capsys):
    part = folder / "part-00001.int32"
    good = part.read_bytes()
    part.write_bytes(DAMAGE[damage](good))
    maker = Maker()
    assert contents(build_table(NAMES, 10, maker, folder=folder)) == TEN
    assert maker.made == [4, 5, 6, 7] and part.read_bytes() == good
    assert capsys.readouterr().out == f"token cache {part} is damaged: made again\n"


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_a_byte_and_no_cut_goes_unnoticed(folder, data):
    part = folder / "part-00000.int32"
    good = part.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    changed = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    part.write_bytes(data.draw(st.sampled_from([changed, good[:place]])))
    maker = Maker()
    assert contents(build_table(NAMES, 10, maker, folder=folder)) == TEN
    assert maker.made == [0, 1, 2, 3] and part.read_bytes() == good


def test_a_part_of_another_table_is_not_taken(folder, tmp_path):
    """It is whole, but has other rows, or as many of fewer segments."""
    build_table(NAMES, 3, Maker(), folder=tmp_path / "fewer")
    build_table(NAMES[:1], 10, lambda rows: Maker()(rows)[:1], folder=tmp_path / "narrower")
    for other in ("fewer", "narrower"):
        shutil.copy(tmp_path / other / "part-00000.int32", folder / "part-00001.int32")
        maker = Maker()
        assert contents(build_table(NAMES, 10, maker, folder=folder)) == TEN
        assert maker.made == [4, 5, 6, 7]


def test_a_missing_part_is_made_without_a_word(folder, capsys):
    (folder / "part-00002.int32").unlink()
    maker = Maker()
    assert contents(build_table(NAMES, 10, maker, folder=folder)) == TEN
    assert maker.made == [8, 9] and capsys.readouterr().out == ""


def test_foreign_files_are_left_alone(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / ".part-00000.int32.ab12.partial").write_bytes(b"half")
    (folder / "part-00007.int32").write_bytes(b"of a larger table")
    maker = Maker()
    assert contents(build_table(NAMES, 10, maker, folder=folder)) == TEN and maker.made == []
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_may_only_be_read_is_enough(folder, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    assert contents(build_table(NAMES, 10, Maker(), folder=folder)) == TEN


# --- Several processes ---


def together(folder: Path, makers, wait=None) -> list:
    """What each of several processes finds that build one table at the same time."""
    found, count = [None] * len(makers), len(makers)

    def process(index: int) -> None:
        options = {} if wait is None else {"share": (index, count), "wait": wait}
        found[index] = contents(build_table(NAMES, 10, makers[index], folder=folder, **options))

    threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_process_makes_its_share(tmp_path, count):
    makers = [Maker() for _ in range(count)]
    found = together(tmp_path / "table", makers, threading.Barrier(count, timeout=60).wait)
    assert found == [TEN] * count
    assert sorted(row for maker in makers for row in maker.made) == list(range(10))
    assert {row // 4 for row in makers[0].made} == set(range(0, 3, count))


def test_the_share_of_a_process_that_did_nothing_is_made_by_the_others(tmp_path):
    maker, waited = Maker(), []
    table = build_table(NAMES, 10, maker, folder=tmp_path / "table", share=(0, 2), wait=lambda: waited.append(True))
    assert contents(table) == TEN and sorted(maker.made) == list(range(10)) and waited == [True]


def test_runs_that_start_together_do_not_harm_each_other(tmp_path):
    for _ in range(5):
        shutil.rmtree(tmp_path / "table", ignore_errors=True)
        assert together(tmp_path / "table", [Maker() for _ in range(4)]) == [TEN] * 4
        assert sorted(path.name for path in (tmp_path / "table").iterdir()) == [f"part-0000{n}.int32" for n in range(3)]


# --- What is kept ---


def aged(root: Path, days: dict[str, float]) -> list[Path]:
    folders = []
    for name, age in days.items():
        folders.append(root / (name * 64))
        folders[-1].mkdir()
        (folders[-1] / "part-00000.int32").touch()
        then = time.time() - age * 24 * 3600
        os.utime(folders[-1], (then, then))
    return folders


def test_the_eight_used_last_are_kept(tmp_path):
    folders = aged(tmp_path, {name: 2 + place for place, name in enumerate("0123456789ab")})
    others = [tmp_path / "mine", tmp_path / "c"]
    for other in others:
        other.mkdir(exist_ok=True)
        os.utime(other, (0, 0))
    remove_old(tmp_path)
    assert [folder.exists() for folder in folders] == [True] * 8 + [False] * 4
    assert all(other.exists() for other in others), "not made here"


def test_what_was_used_within_a_day_is_kept(tmp_path):
    folders = aged(tmp_path, {name: 0.01 * place for place, name in enumerate("0123456789ab")})
    remove_old(tmp_path)
    assert all(folder.exists() for folder in folders)


def test_a_new_table_takes_the_place_of_the_oldest_and_use_counts(tmp_path):
    folders = aged(tmp_path, {name: 2 + place for place, name in enumerate("12345678")})
    shutil.rmtree(folders[-1])
    build_table(NAMES, 10, Maker(), folder=folders[-1])
    then = time.time() - 30 * 24 * 3600
    os.utime(folders[-1], (then, then))
    build_table(NAMES, 10, Maker(), folder=folders[-1])  # used, though made long ago
    build_table(NAMES, 10, Maker(), folder=tmp_path / ("a" * 64))
    assert [folder.exists() for folder in folders] == [True] * 6 + [False, True]
