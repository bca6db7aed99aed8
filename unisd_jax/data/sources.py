"""Where a task's rows come from: a file, a folder of files, the hub, tensorflow-datasets, or the package itself."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unisd_jax.data.rows import SUFFIXES, Row, listed, read_rows, reason
from unisd_jax.data.tasks.base import Task
from unisd_jax.errors import ConfigError, UserError

_SPLIT = re.compile(r"(?:(?P<config>[\w.-]+)/)?(?P<split>\w+)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


class Split(NamedTuple):
    """A split's full name, as in `Source`, and the slice of its rows that is wanted."""

    name: str
    rows: slice

    @property
    def config(self) -> str:
        """The part before the slash; empty without one."""
        return self.name.rpartition("/")[0]

    @property
    def short(self) -> str:
        """The part after the slash."""
        return self.name.rpartition("/")[2]


class Place(NamedTuple):
    """The options that say where rows are: see `data` in `configs/base.yaml`; `file` is that of the split wanted."""

    origin: Literal["auto", "hub", "tfds"] = "auto"
    path: Path | None = None
    file: Path | None = None
    revision: str | None = None


class Found(NamedTuple):
    """Rows, where they are from, and how many the whole split has where it was published (None: not known)."""

    rows: list[Row]
    origin: str
    published: int | None


def parse_split(text: str, task: Task, option: str) -> Split:
    """`split`, `config/split`, either with a slice of the rows as in `train[:100]`; the config may be left out.

    Raises:
      ConfigError: the text has another form, or names a split that the task does not have.
    """
    match = _SPLIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} is {text!r}, expected a split such as 'train', 'config/train' or 'train[:100]'")
    rows = slice(*(int(match[name]) if match[name] else None for name in ("start", "stop")))
    config, split = match["config"], match["split"]
    if config is None and "/" in (task.train or task.test):
        config = (task.train or task.test).partition("/")[0]
    known = {} if task.source is None else task.source.folders
    if known and (config or "") not in known:
        raise ConfigError(f"{option} is {text!r}; task {task.name!r} has the configs {listed(tuple(known))}")
    return Split(f"{config}/{split}" if config else split, rows)


def find_rows(task: Task, split: Split, place: Place, side: str) -> Found:
    """The rows of a split for `side`, "train" or "test", from where the options say.

    Raises:
      ConfigError: nothing says where the rows are.
      UserError: they are not there, or cannot be read.
    """
    if place.file is not None:
        return Found(read_rows(place.file), str(place.file), None)
    if place.path is not None:
        return _from_folder(task, split, place.path, side)
    if place.origin == "auto" and task.embedded is not None:
        path = task.embedded(split.name)
        return Found(read_rows(path), "the package", None)
    if task.source is None:
        raise ConfigError(f"task {task.name!r} has no data of its own: set data.{side}_path to the {side} file")
    if place.origin == "tfds":
        return _from_tfds(task, split)
    return _from_hub(task, split, place.revision)


def _with_size(task: Task, split: Split, rows: list[Row], origin: str) -> Found:
    return Found(rows, origin, task.source.sizes.get(split.name) if task.source else None)


def _from_folder(task: Task, split: Split, folder: Path, side: str) -> Found:
    """A folder that holds the split, or holds the folder that does."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise UserError(f"data.path: {folder} is {kind}, expected a folder; data.{side}_path names one file")
    names = (split.config or task.name,) if task.source is None else task.source.folders[split.config]
    configs = 1 if task.source is None else len(task.source.folders)
    places = [folder / name for name in names]
    # Where a task has several configs, the folder's own files are those of the config it is called after.
    if configs == 1 or folder.name in names:
        places = [folder, *places, folder / "data"]
    for place in places:
        for stem in (split.short, f"{split.short}_small"):
            for suffix in SUFFIXES:
                if (path := place / f"{stem}{suffix}").is_file():
                    return _with_size(task, split, read_rows(path), str(path))
        found = place.glob(f"{split.short}-*-of-*.parquet")
        shards = sorted(path for path in found if path.stem.rpartition("-of-")[2].isdecimal())
        if shards:
            return _with_size(task, split, _from_shards(shards), str(place / f"{split.short}-*.parquet"))
    raise UserError(
        f"data.path: found no {split.short} file ({', '.join(split.short + suffix for suffix in SUFFIXES)}) in "
        f"{' or '.join(map(str, places))}; data.{side}_split names another split, data.{side}_path one file"
    )


def _from_shards(shards: Sequence[Path]) -> list[Row]:
    total = int(shards[0].stem.rpartition("-of-")[2])
    if len(shards) != total:
        raise UserError(f"data.path: found {len(shards)} of the {total} files {shards[0].parent}/*.parquet")
    return [row for shard in shards for row in read_rows(shard)]


def _from_hub(task: Task, split: Split, revision: str | None) -> Found:
    """Through `datasets`, which downloads once and keeps a copy.

    Raises:
      UserError: the package, the network, the rights or the split is missing, or the copy is not the pinned one.
    """
    source = task.source
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"the rows of task {task.name!r} are on the hub, which needs the extra [hub]: pip install "
            "'unisd_jax[hub]'; or set data.path to a folder that holds them"
        ) from None
    wanted = revision or source.revision
    origin = f"hub {source.repository} at {wanted[:12] if wanted else 'its newest revision, as none is pinned'}"
    try:
        table = datasets.load_dataset(source.repository, split.config or None, split=split.short, revision=wanted)
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):  # only whether there is one is asked for, never the pixels
                table = table.cast_column(name, datasets.Image(decode=False))
    except Exception as error:  # its own, the hub's, the network's and pyarrow's: one line of each says enough
        raise UserError(
            f"{origin}: split {split.name} cannot be loaded ({reason(error)}); without a network set data.path to a "
            "folder that holds the rows"
        ) from error
    _check_revision(table, wanted, origin)
    rows = [Row(f"{source.repository} {split.name}, row {number}", dict(row)) for number, row in enumerate(table, 1)]
    return _checked(rows, origin, split, source.sizes.get(split.name) if revision is None else None)


def _check_revision(table: Any, revision: str | None, origin: str) -> None:
    """Without a network `datasets` takes its newest copy, of whichever revision that is."""
    copies = [copy["filename"] for copy in getattr(table, "cache_files", [])]
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and copies and not any(revision in name for name in copies):
        raise UserError(f"{origin}: found a copy of another revision ({copies[0]}); remove it, or set data.revision")


def _from_tfds(task: Task, split: Split) -> Found:
    source = task.source
    if split.name not in source.tfds:
        has = f"only {listed(tuple(source.tfds))}" if source.tfds else "nothing"
        raise UserError(f"tensorflow-datasets has {has} of task {task.name!r}; set data.source=auto for {split.name}")
    try:
        import tensorflow_datasets
        import tensorflow_datasets.text  # noqa: F401  registers the builders
    except ImportError:
        raise UserError("data.source is tfds, which needs the extra [hub]: pip install 'unisd_jax[hub]'") from None
    builder, _, name = source.tfds[split.name].partition("/")
    try:
        table = tensorflow_datasets.data_source(builder, split=name)
    except Exception as error:
        raise UserError(f"tensorflow-datasets cannot load {builder} ({reason(error)}); set data.source=auto") from error
    rows = [
        Row(f"{builder} {name}, row {number}", {key: plain(value) for key, value in row.items()})
        for number, row in enumerate(table, start=1)
    ]
    return _checked(rows, f"tensorflow-datasets {builder}", split, source.sizes.get(split.name))


def _checked(rows: list[Row], origin: str, split: Split, expected: int | None) -> Found:
    if expected is not None and len(rows) != expected:
        raise UserError(
            f"{origin}: split {split.name} has {len(rows)} rows, expected {expected}: not the data that were published"
        )
    return Found(rows, origin, expected)


def plain(value: object) -> object:
    """A value of tensorflow-datasets as JSON would hold it: bytes become text, arrays lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
