"""Text to token ids, once: the tokenizer's chat template, the turn's end, the stop ids."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from unisd_jax.errors import UserError


class Chat:
    """A tokenizer with its chat template. The same object serves training and evaluation.

    Ids from `vocab_size` on stand for no token, though the model's head may have rows for them. `head_rows` is the
    number of these rows where it is known; `notes` are what a user should read once, a line each.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: tuple[int, ...], *, head_rows: int | None = None, notes: tuple[str, ...] = ()
    ):
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
        self.head_rows = head_rows
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, head_rows or sys.maxsize)
        self.notes = notes

    def identity(self) -> str:
        """A hash of everything that decides how text becomes ids and where a reply ends."""
        parts = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, list(self.stop_ids)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The messages followed by the header of the assistant's turn."""
        return self._ids(messages, add_generation_prompt=True)

    def reply_ids(self, messages: list[dict[str, str]], reply: str) -> list[int]:
        """`reply` as the assistant would have produced it after `messages`, with the token that ends the turn.

        Raises:
          UserError: the template does not continue its own prompt, or closes no turn; or the text of `reply` holds a
            stop token, after which the rest would be lost.
        """
        if set(self.tokenizer(reply, add_special_tokens=False)["input_ids"]) & set(self.stop_ids):
            raise UserError(f"completion {reply[:60]!r} holds a token that ends the turn: remove it from the data")
        prompt = self.prompt_ids(messages)
        whole = self._ids([*messages, {"role": "assistant", "content": reply}])
        if whole[: len(prompt)] != prompt:
            raise UserError("chat template: a prompt with its reply does not begin with the prompt's own tokens")
        rest = whole[len(prompt) :]
        ends = [index for index, token in enumerate(rest) if token in self.stop_ids]
        if not ends:
            raise UserError(f"chat template: no stop token {self.stop_ids} after the assistant's reply")
        return rest[: ends[0] + 1]

    def text(self, ids: list[int]) -> str:
        """What a reader sees: special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _ids(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
        try:
            ids = list(
                self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
            )
        except TemplateError as error:
            raise UserError(f"chat template: it refuses a conversation ({_reason(error)})") from None
        if self.head_rows is not None and max(ids, default=0) >= self.head_rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(f"text holds the token {token!r}, for which the model has no row: remove it from the data")
        return ids


def load_chat(path: str | Path, *, stop: Literal["all", "tokenizer"] = "all", head_rows: int | None = None) -> Chat:
    """The tokenizer of a checkpoint directory; `head_rows` of its model are read from `config.json` where not given.

    The stop ids are the union of the tokenizer's EOS and those of `generation_config.json` and `config.json`. With
    `stop` "tokenizer" they are the tokenizer's alone, as in the release: a model that ends its turns with another token
    then never stops.

    Raises:
      UserError: no tokenizer there, one that needs code of its own, no chat template, no EOS, or a token that the
        model of `config.json` has no row for.
    """
    # transformers announces at import that torch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    path = Path(path)
    if not (path / "tokenizer_config.json").exists():
        raise UserError(f"model.path: {path} has no tokenizer_config.json; expected a chat model's tokenizer there")
    _refuse_own_code(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a file it does not understand
        raise UserError(f"model.path: the tokenizer in {path} cannot be loaded ({_reason(error)})") from None
    if tokenizer.chat_template is None:
        raise UserError(f"model.path: the tokenizer in {path} has no chat template; use a chat (instruct) model")
    sources = {} if tokenizer.eos_token_id is None else {"tokenizer": {tokenizer.eos_token_id}}
    for name in ("generation_config.json", "config.json") if stop == "all" else ():
        if found := _eos_token_ids(path / name):
            sources[name] = found
    if not sources:
        raise UserError(f"model.path: neither the tokenizer nor generation_config.json in {path} names an EOS token")
    stop_ids = tuple(sorted(set.union(*sources.values())))
    rows = _head_rows(path / "config.json") if head_rows is None else head_rows
    notes = [*_stop_notes(sources), *_padding_notes(tokenizer, stop_ids)]
    if rows is not None:
        notes += check_vocabulary(tokenizer, stop_ids, rows)
    return Chat(tokenizer, stop_ids, head_rows=rows, notes=tuple(notes))


def check_vocabulary(tokenizer: Any, stop_ids: tuple[int, ...], rows: int) -> list[str]:
    """What there is to say where a tokenizer and a head of `rows` rows differ in size.

    A larger head is common: it is filled up to a round number. A tokenizer may only have placeholders beyond the head,
    as Gemma's for images: text that holds one is refused when it is tokenized.

    Raises:
      UserError: a token that text leads to lies beyond the head, where a lookup would silently take the last row.
    """
    vocabulary = tokenizer.get_vocab()
    needed = {*stop_ids, tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    placeholders = set(tokenizer.added_tokens_decoder) - needed
    beyond = {token: index for token, index in vocabulary.items() if index >= rows}
    lost = [index for index in (*beyond.values(), *needed) if index >= rows and index not in placeholders]
    if lost:
        token = tokenizer.convert_ids_to_tokens(min(lost))
        raise UserError(
            f"model.path: token {min(lost)} ({token!r}) of the tokenizer lies beyond the {rows} rows of the model's "
            "head: use the tokenizer that belongs to these weights"
        )
    if beyond:
        names = ", ".join(sorted(beyond, key=beyond.get)[:3]) + (", ..." if len(beyond) > 3 else "")
        return [f"the model has no row for {len(beyond)} token(s) of its tokenizer ({names}): text must not hold them"]
    unused = rows - 1 - max(vocabulary.values())
    return [f"the last {unused} of the head's {rows} rows belong to no token and are never sampled"] if unused else []


def _stop_notes(sources: dict[str, set[int]]) -> list[str]:
    if len(set(map(frozenset, sources.values()))) == 1:
        return []
    said = ", ".join(f"{name} {sorted(ids)}" for name, ids in sources.items())
    return [f"a reply ends at any of the ids {sorted(set.union(*sources.values()))}, united from {said}"]


def _padding_notes(tokenizer: Any, stop_ids: tuple[int, ...]) -> list[str]:
    if tokenizer.pad_token_id is not None:
        return []
    token = tokenizer.convert_ids_to_tokens(stop_ids[0])
    return [f"the tokenizer has no padding token: id {stop_ids[0]} ({token}) stands in, told apart by masks"]


def _refuse_own_code(path: Path) -> None:
    """A tokenizer that comes as code, as InternLM3's, is not run."""
    if (path / "tokenizer.json").exists():
        return
    if "AutoTokenizer" in (_object(path / "tokenizer_config.json").get("auto_map") or {}):
        raise UserError(
            f"model.path: the tokenizer in {path} is code of its own (auto_map), which is never run here: where you "
            "trust it, convert it with transformers (convert_slow_tokenizer) and put the tokenizer.json there"
        )


def _head_rows(path: Path) -> int | None:
    config = _object(path)
    rows = (config.get("text_config") or config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _eos_token_ids(path: Path) -> set[int]:
    value = _object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"model.path: {path}: eos_token_id is {value!r}; expected an integer or a list of integers")
    return set(ids)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"model.path: {path} is not a JSON object")
    return value


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
