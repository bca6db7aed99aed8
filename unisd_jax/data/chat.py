"""Text to token ids, once: the tokenizer's chat template, the turn's end, the stop ids."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from unisd_jax.errors import UserError

Messages = list[dict[str, str]]

# So many that the calls themselves cost nothing, so few that what the encoder holds beside the ids stays small.
TEXTS_PER_CALL = 256


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
        self._is_plain = _is_plain(tokenizer)

    def identity(self) -> str:
        """A hash of everything that decides how text becomes ids and where a reply ends."""
        parts = _backend(self.tokenizer).to_str(), self.tokenizer.chat_template, list(self.stop_ids)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The messages followed by the header of the assistant's turn."""
        return self.prompts_ids([messages])[0].tolist()

    def reply_ids(self, messages: Messages, reply: str) -> list[int]:
        """`reply` as the assistant would have produced it after `messages`, with the token that ends the turn.

        Raises:
          UserError: as `replies_ids`.
        """
        return self.replies_ids([messages], [reply], self.prompts_ids([messages]))[0].tolist()

    def prompts_ids(self, conversations: Sequence[Messages]) -> list[np.ndarray]:
        """`prompt_ids` of many conversations, int32; threads may call it at the same time.

        Raises:
          UserError: the template refuses a conversation, or a text cannot be encoded for this model.
        """
        return self._ids(conversations, add_generation_prompt=True)

    def replies_ids(
        self, conversations: Sequence[Messages], replies: Sequence[str], prompts: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """`reply_ids` of many replies, int32; `prompts` are the `prompts_ids` of the conversations.

        Raises:
          UserError: as `prompts_ids`; or the template does not continue its own prompt, or closes no turn; or the text
            of a reply holds a stop token, after which the rest would be lost.
        """
        stop_ids = set(self.stop_ids)
        for reply, ids in zip(replies, self._encoded(replies), strict=True):
            if not stop_ids.isdisjoint(ids.tolist()):
                raise UserError(f"completion {reply[:60]!r} holds a token that ends the turn: remove it from the data")
        wholes = self._ids(
            [
                [*messages, {"role": "assistant", "content": reply}]
                for messages, reply in zip(conversations, replies, strict=True)
            ]
        )
        return [self._reply(whole, prompt) for whole, prompt in zip(wholes, prompts, strict=True)]

    def text(self, ids: Sequence[int]) -> str:
        """What a reader sees: special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def rendered(self, conversations: Sequence[Messages], **options: bool) -> list[str]:
        """The template's text of each conversation.

        Raises:
          UserError: the template refuses one.
        """
        if not conversations:
            return []
        try:
            return self.tokenizer.apply_chat_template(list(conversations), tokenize=False, **options)
        except TemplateError as error:
            raise UserError(f"chat template: it refuses a conversation ({_reason(error)})") from None

    def _ids(self, conversations: Sequence[Messages], **options: bool) -> list[np.ndarray]:
        """What `apply_chat_template` gives with `tokenize=True`, a whole batch at a time."""
        found: list[np.ndarray] = []
        for start in range(0, len(conversations), TEXTS_PER_CALL):
            found += self._encoded(self.rendered(conversations[start : start + TEXTS_PER_CALL], **options))
        highest = max((int(ids.max()) for ids in found if len(ids)), default=0)
        if self.head_rows is not None and highest >= self.head_rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"text holds the token {token!r}, for which the model has no row: remove it from the data")
        return found

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of texts without further special tokens, int32; other threads run meanwhile."""
        texts = list(texts)
        try:
            if texts and not self._is_plain:
                return [np.array(ids, np.int32) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
            encodings = _backend(self.tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            # Written in JSON as "\ud83d" without its second half; Python reads that, but it is no text.
            broken = next((text for text in texts if _has_half_characters(text)), None)
            if broken is None:
                raise
            raise UserError(f"text {broken[:60]!r} holds half a character, a lone surrogate: repair the data") from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _reply(self, whole: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        """What comes after `prompt` in `whole`, to the end of the turn."""
        if not np.array_equal(whole[: len(prompt)], prompt):
            raise UserError("chat template: a prompt with its reply does not begin with the prompt's own tokens")
        rest = whole[len(prompt) :]
        ends = np.flatnonzero(np.isin(rest, self.stop_ids))
        if not len(ends):
            raise UserError(f"chat template: no stop token {self.stop_ids} after the assistant's reply")
        return rest[: ends[0] + 1]


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


def _is_plain(tokenizer: Any) -> bool:
    """Whether the tokenizer's ids are those of its Rust backend; a few families do something of their own around it."""
    from transformers import PreTrainedTokenizerFast

    return getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus


def _backend(tokenizer: Any) -> Any:
    """The Rust encoder, set as `apply_chat_template` sets it: a tokenizer.json may ask for cutting and padding."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _has_half_characters(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


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
