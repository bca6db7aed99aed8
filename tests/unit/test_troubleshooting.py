"""docs/troubleshooting.md: its messages are in the source, those of the package are on it, and some are met here."""

import ast
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator

import pages
import pytest

from unisd_jax.checkpoint import Checkpoints
from unisd_jax.config import load_config, parse_command_line
from unisd_jax.config_options import DistributedOptions
from unisd_jax.data.chat import load_chat
from unisd_jax.data.loading import load_items
from unisd_jax.data.pipeline import ViewMessages, fitting, tokenize
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import Item, get_task
from unisd_jax.errors import UserError
from unisd_jax.experiments.slots import parse_devices
from unisd_jax.guards import check_metrics
from unisd_jax.metrics import read_metrics
from unisd_jax.models import load_hf, load_peft, read_config, resolve_attention
from unisd_jax.parallel.mesh import build_mesh
from unisd_jax.parallel.multihost import join_arguments
from unisd_jax.results import open_run_dir, write_config
from unisd_jax.rollout.vllm_command import _interpreter
from unisd_jax.teacher import student_messages
from unisd_jax.testing import tiny_checkpoint, tiny_model

PAGE = "docs/troubleshooting.md"
# Stands in a message for what differs.
DIFFERS = "\0"
# A message of which less than this is fixed says nothing that could be searched for.
LETTERS = 7


# --- The messages of the page and of the source ---


@functools.cache
def entries() -> tuple[str, ...]:
    """The messages in the first column of the tables; a row may have several. Those of other programs are left out."""
    found = []
    for line in pages.page(PAGE).splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and " own)" not in cells[0]:
            found += re.findall(r"`([^`]+)`", cells[0])
    return tuple(found)


def matches(entry: str, message: str) -> bool:
    """Whether the fixed pieces of an entry stand in a message, in this order."""
    pieces = entry.split("...")
    # The pattern alone would take seconds for all pairs.
    return all(piece in message for piece in pieces) and bool(
        re.search(".*".join(map(re.escape, pieces)), message, re.DOTALL)
    )


def text_of(node: ast.AST) -> str | None:
    """A string as the source builds it: pieces joined, `DIFFERS` for what is put in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or DIFFERS for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or DIFFERS) + (text_of(node.right) or DIFFERS)
    return None


@functools.cache
def sources(*folders: str) -> dict[str, ast.Module]:
    paths = itertools.chain(*((pages.REPOSITORY / folder).rglob("*.py") for folder in folders))
    return {str(path.relative_to(pages.REPOSITORY)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def strings() -> set[str]:
    trees = sources("unisd_jax", "scripts").values()
    return {text for tree in trees for node in ast.walk(tree) if (text := text_of(node))}


def raised() -> Iterator[tuple[str, str]]:
    """(place, message) of everything that the package raises as a UserError or as one of its kinds."""
    trees = sources("unisd_jax")
    kinds = {"UserError"}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in classes:
        kinds |= {node.name for node in classes if kinds & {getattr(base, "id", None) for base in node.bases}}
    assert {"ConfigError", "RolloutFailed", "NotPrepared", "LostProcess"} <= kinds
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
                continue
            message = text_of(node.exc.args[0])
            if getattr(node.exc.func, "id", None) in kinds and message and fixed(message) >= LETTERS:
                yield f"{path}:{node.lineno}", message


def fixed(message: str) -> int:
    return len(message.replace(DIFFERS, "").replace("...", "").strip())


def test_every_entry_can_be_searched_for():
    short = [entry for entry in entries() if fixed(entry) < LETTERS]
    assert not short and len(set(entries())) == len(entries()) > 200


def test_every_entry_is_a_message_of_the_source():
    known = strings()
    stale = [entry for entry in entries() if not any(matches(entry, text) for text in known)]
    assert not stale


def test_every_message_of_the_package_has_an_entry():
    found = list(raised())
    assert len(found) > 200
    missing = [
        f"{place}: {message.replace(DIFFERS, '...')}"
        for place, message in found
        if not any(matches(entry, message) for entry in entries())
    ]
    assert not missing, "\n".join(missing)


# --- Some of them met ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def config(tmp_path, *words):
    base = pages.REPOSITORY / "configs/base.yaml"
    return load_config(base, ["--model.path=x", f"--output_dir={tmp_path}", *words])


def changed_options(tmp_path):
    run_dir = open_run_dir(config(tmp_path))
    run_dir.mkdir()
    write_config(run_dir, config(tmp_path))
    open_run_dir(config(tmp_path, "--train.steps=7"))


def long_prompt(model, overlong):
    messages = student_messages("How many?" * 20)
    items = [Item("i1", messages[0]["content"], "3", "3")]
    examples = tokenize(items, [ViewMessages(messages, None, (), None)], load_chat(model))
    fitting(examples, max_prompt_length=64, overlong=overlong)


def without(model, tmp_path, name):
    copy = tiny_checkpoint(tmp_path / "copy")
    (copy / name).unlink()
    return copy


def other_architecture(tmp_path):
    copy = tiny_checkpoint(tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    read_config(copy)


def rows(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    load_items(get_task("jsonl"), "train", place=Place(file=tmp_path / "rows.jsonl"))


def diverged(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    try:
        check_metrics({"loss": math.nan, "gradient_norm": 1.0}, config(tmp_path), 3, [], checkpoints)
    finally:
        checkpoints.close()


def adapter(tmp_path):
    load_peft(tmp_path, *tiny_model())


MET = {
    "--config FILE is missing": lambda path, model: parse_command_line([], "prog"),
    "unknown option ...; ...": lambda path, model: config(path, "--train.step=3"),
    "... must be ..., found ...": lambda path, model: config(path, "--train.steps=0"),
    "mode ... ..., and it is switched ...": lambda path, model: config(path, "--teacher.ema=true"),
    "cannot read configuration file": lambda path, model: load_config(path / "none.yaml"),
    "model.path: ... is not a directory; expected a Hugging Face checkpoint": lambda path, model: read_config(
        path / "x"
    ),
    "config.json: model_type is ...; supported": lambda path, model: other_architecture(path),
    "has no *.safetensors file": lambda path, model: load_hf(without(model, path, "model.safetensors")),
    "the tokenizer in ... has no chat template": lambda path, model: load_chat(
        without(model, path, "chat_template.jinja")
    ),
    "is not an adapter of peft's": lambda path, model: adapter(path),
    "unknown task ..., did you mean": lambda path, model: get_task("gsm8"),
    "data file ... does not exist": lambda path, model: load_items(
        get_task("jsonl"), "train", place=Place(file=path / "x")
    ),
    "...: field ... is ..., expected ...": lambda path, model: rows(path, '{"prompt": 3, "reference": "x"}\n'),
    "not valid JSON (...), expected one JSON object a line": lambda path, model: rows(path, "{]\n"),
    "item ...: ... has ... tokens, ... is ...; raise the limit": lambda path, model: long_prompt(model, "error"),
    "all ... items are too long": lambda path, model: long_prompt(model, "drop"),
    "holds a run with other options (...)": lambda path, model: changed_options(path),
    "step ...: ... is ...; ...": lambda path, model: diverged(path),
    "is not there: expected the ... of a run directory": lambda path, model: read_metrics(path / "metrics.jsonl"),
    "mesh.data x mesh.fsdp x mesh.tensor = ... devices, found": lambda path, model: build_mesh(data=99),
    "model.attention is ...": lambda path, model: resolve_attention(
        "splash", backend="cpu", dtype="float32", head_dim=8
    ),
    "rollout.vllm.python: ...": lambda path, model: _interpreter(str(path / "python")),
    "a coordinator (...) needs it, as an option or as": lambda path, model: join_arguments(
        DistributedOptions(coordinator="host:1"), {}
    ),
    "--devices ...": lambda path, model: parse_devices("gpu:x"),
}


@pytest.mark.parametrize("entry", MET)
def test_a_message_as_the_page_has_it(entry, model, tmp_path, monkeypatch):
    assert entry in entries()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        MET[entry](tmp_path, model)
    assert matches(entry, str(caught.value)), caught.value
