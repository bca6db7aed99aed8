"""Text to token ids, once: the tokenizer's chat template, the turn's end, the stop ids."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from unisd_jax.errors import UserError


class Chat:
    """A tokenizer with its chat template. The same object serves training and evaluation."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]):
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]

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
            return list(
                self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
            )
        except TemplateError as error:
            raise UserError(f"chat template: it refuses a conversation ({_reason(error)})") from None


def load_chat(path: str | Path, *, stop: Literal["all", "tokenizer"] = "all") -> Chat:
    """The tokenizer of a checkpoint directory.

    The stop ids are the union of the tokenizer's EOS and those of `generation_config.json` and `config.json`. With
    `stop` "tokenizer" they are the tokenizer's alone, as in the release: a model that ends its turns with another token
    then never stops.

    Raises:
      UserError: no tokenizer there, no chat template, or no EOS.
    """
    # transformers announces at import that torch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    path = Path(path)
    if not (path / "tokenizer_config.json").exists():
        raise UserError(f"model.path: {path} has no tokenizer_config.json; expected a chat model's tokenizer there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises plain Exception for a file it does not understand
        raise UserError(f"model.path: the tokenizer in {path} cannot be loaded ({_reason(error)})") from None
    if tokenizer.chat_template is None:
        raise UserError(f"model.path: the tokenizer in {path} has no chat template; use a chat (instruct) model")
    stop_ids = _stop_ids(
        path, tokenizer.eos_token_id, ("generation_config.json", "config.json") if stop == "all" else ()
    )
    if not stop_ids:
        raise UserError(f"model.path: neither the tokenizer nor generation_config.json in {path} names an EOS token")
    return Chat(tokenizer, stop_ids)


def _stop_ids(path: Path, eos: int | None, files: tuple[str, ...]) -> tuple[int, ...]:
    found = set() if eos is None else {eos}
    for name in files:
        if (path / name).exists():
            value = _eos_token_id(path / name)
            found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return tuple(sorted(found))


def _eos_token_id(path: Path) -> int | list[int] | None:
    try:
        value = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError):
        raise UserError(f"model.path: {path} is not a JSON object") from None
    if not all(isinstance(token, int) for token in (value if isinstance(value, list) else [value or 0])):
        raise UserError(f"model.path: {path}: eos_token_id is {value!r}; expected an integer or a list of integers")
    return value


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
