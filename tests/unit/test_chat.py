"""Chat: the template's own ids, the end of a turn, and which tokens stop a reply."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unisd_jax.data.chat import Chat, load_chat
from unisd_jax.errors import UserError
from unisd_jax.testing import TURN_END, byte_tokenizer, tiny_checkpoint

TOKENS = len(byte_tokenizer())
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
DIALOGUE = [*QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def directory(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(checkpoint, tmp_path / "tiny")


@pytest.fixture(scope="module")
def chat(checkpoint):
    return load_chat(checkpoint)


def template_ids(chat, messages, **options):
    return list(chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def with_template(template: str) -> Chat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, (tokenizer.eos_token_id,))


@pytest.mark.parametrize("messages", [QUESTION, DIALOGUE])
@pytest.mark.parametrize("reply", ["4", "", "two\nlines", 'ö€{"answer": "x"}', " space around "])
def test_prompt_and_reply_are_the_templates_own_ids(chat, messages, reply):
    prompt, ids = chat.prompt_ids(messages), chat.reply_ids(messages, reply)
    whole = template_ids(chat, [*messages, {"role": "assistant", "content": reply}])
    assert prompt == template_ids(chat, messages, add_generation_prompt=True)
    assert prompt + ids == whole[: len(prompt) + len(ids)]
    assert chat.tokenizer.decode(whole[len(prompt) + len(ids) :]) == "\n", "only the template's own line break is left"
    assert ids[-1] == chat.tokenizer.eos_token_id
    assert chat.text(ids) == reply


def test_prompt_ends_with_the_header_of_the_assistants_turn(chat):
    assert chat.tokenizer.decode(chat.prompt_ids(QUESTION)).endswith("<|im_start|>assistant\n")


def test_a_reply_that_would_be_cut_is_refused(chat):
    with pytest.raises(UserError, match="ends the turn") as error:
        chat.reply_ids(QUESTION, f"before{TURN_END}after")
    assert "before" in str(error.value)


def test_a_template_that_rewrites_its_prompt_is_refused():
    chat = with_template(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UserError, match="does not begin with the prompt's own tokens"):
        chat.reply_ids(QUESTION, "4")


def test_a_template_that_closes_no_turn_is_refused():
    chat = with_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="no stop token"):
        chat.reply_ids(QUESTION, "4")


# --- Many at once ---

REPLIES = ["4", "", "two\nlines", 'ö€{"answer": "x"}', " space around ", "字" * 300, "\x00\u2028 <|im_st", "a" * 5000]


def assert_batches_are_exact(chat, conversations):
    """Each as `apply_chat_template` has it, int32, in whatever batch it comes."""
    prompts = chat.prompts_ids(conversations)
    replies = [REPLIES[index % len(REPLIES)] for index in range(len(conversations))]
    golds = chat.replies_ids(conversations, replies, prompts)
    for messages, reply, prompt, gold in zip(conversations, replies, prompts, golds, strict=True):
        assert prompt.dtype == gold.dtype == np.int32 and prompt.ndim == gold.ndim == 1
        assert prompt.tolist() == template_ids(chat, messages, add_generation_prompt=True)
        whole = template_ids(chat, [*messages, {"role": "assistant", "content": reply}])
        assert prompt.tolist() + gold.tolist() == whole[: len(prompt) + len(gold)]
        assert gold[-1] in chat.stop_ids
    return prompts


def conversations(count: int) -> list:
    texts = [*REPLIES, "What is 2 + 2?", "  indented\n\n\nlines\t", "it's", "x" * 20_000]
    return [
        [{"role": "user", "content": f"{texts[n % len(texts)]}{n}"}, *DIALOGUE[: 2 * (n % 2)]] for n in range(count)
    ]


def test_a_batch_is_each_conversation_alone(chat, monkeypatch):
    whole = assert_batches_are_exact(chat, conversations(30))
    monkeypatch.setattr("unisd_jax.data.chat.TEXTS_PER_CALL", 7)
    for ids, again in zip(whole, chat.prompts_ids(conversations(30)), strict=True):
        np.testing.assert_array_equal(ids, again)
    assert chat.prompts_ids([]) == [] and chat.replies_ids([], [], []) == []


def test_a_batch_with_the_real_tokenizer(smollm2_path):
    assert_batches_are_exact(load_chat(smollm2_path), conversations(60))


def test_threads_may_tokenise_at_the_same_time(directory):
    """The tokenizer's first call may set it up; none may see it half set up."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    chat = Chat(tokenizer, (tokenizer.eos_token_id,))
    expected = [load_chat(directory).prompt_ids(messages) for messages in conversations(12)]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: chat.prompts_ids(conversations(12)), range(40)):
            assert [ids.tolist() for ids in found] == expected


def test_nothing_is_cut_or_padded_whatever_the_tokenizer_is_set_to(directory):
    settings = json.loads((directory / "tokenizer.json").read_text())
    settings["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    expected = load_chat(directory).prompt_ids(DIALOGUE)
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    chat = load_chat(directory)
    before = chat.identity()
    assert chat.prompt_ids(DIALOGUE) == expected and chat.identity() == before
    chat.tokenizer(["a", "bc"], padding=True, truncation=True, max_length=3)
    assert chat.prompt_ids(DIALOGUE) == expected and chat.identity() == before


def test_special_tokens_as_text(directory):
    """A tokenizer may be told to read special tokens in text as plain text; then so do we."""
    edit_json(directory / "tokenizer_config.json", split_special_tokens=True)
    chat = load_chat(directory)
    assert chat.prompt_ids(QUESTION) == template_ids(chat, QUESTION, add_generation_prompt=True)
    assert TURN_END.encode()[0] in chat.tokenizer.decode(chat.prompt_ids(QUESTION)).encode()


def test_a_tokenizer_with_an_encoding_of_its_own_is_asked_itself(chat):
    class Own(type(byte_tokenizer())):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([part.replace("2", "two") for part in text], **options)

    plain = byte_tokenizer()
    own = Own(tokenizer_object=plain.backend_tokenizer, eos_token=TURN_END, chat_template=plain.chat_template)
    assert Chat(own, chat.stop_ids).text(Chat(own, chat.stop_ids).prompt_ids(QUESTION)).count("two") == 2
    assert Chat(own, chat.stop_ids).replies_ids([], [], []) == []


def test_one_bad_text_in_a_batch_is_an_error_of_its_own(chat):
    good = [{"role": "user", "content": "good"}]
    prompts = chat.prompts_ids([good, good])
    with pytest.raises(UserError, match="completion 'so.* holds a token that ends the turn"):
        chat.replies_ids([good, good], ["fine", f"so{TURN_END}"], prompts)
    with pytest.raises(UserError, match="does not begin with the prompt's own tokens"):
        chat.replies_ids([good, good], ["fine", "fine"], [prompts[0], prompts[1][1:]])
    with pytest.raises(UserError, match=r"text .*no text\\ud83d.* holds half a character"):
        chat.prompts_ids([good, [{"role": "user", "content": "no text\ud83d"}]])
    with pytest.raises(UserError, match="holds half a character"):
        chat.reply_ids(good, "\ud83d")


def test_a_template_that_refuses_one_conversation_of_a_batch():
    chat = with_template(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match=r"chat template: it refuses a conversation \(no system\)"):
        chat.prompts_ids([QUESTION, [{"role": "system", "content": "be good"}, *QUESTION]])


def test_text_leaves_special_tokens_out(chat):
    ids = [chat.pad_id, *chat.tokenizer("so", add_special_tokens=False)["input_ids"], *chat.stop_ids]
    assert chat.text(ids) == "so"


def test_padding_falls_back_to_a_stop_token():
    tokenizer = byte_tokenizer()
    assert Chat(tokenizer, (7, 9)).pad_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert Chat(tokenizer, (7, 9)).pad_id == 7


# --- Stop ids ---


def edit_json(path, **changes):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in (found | changes).items() if value is not None}))


def test_stop_ids_are_the_union_of_tokenizer_and_configs(directory):
    eos = byte_tokenizer().eos_token_id
    assert load_chat(directory).stop_ids == (eos,)
    edit_json(directory / "generation_config.json", eos_token_id=[5, 6])
    assert load_chat(directory).stop_ids == (5, 6, eos)
    edit_json(directory / "config.json", eos_token_id=4)
    assert load_chat(directory).stop_ids == (4, 5, 6, eos)
    edit_json(directory / "generation_config.json", eos_token_id=eos)
    assert load_chat(directory).stop_ids == (4, eos)


def test_stop_ids_may_come_from_the_generation_config_alone(directory):
    edit_json(directory / "tokenizer_config.json", eos_token=None)
    edit_json(directory / "generation_config.json", eos_token_id=5)
    assert load_chat(directory).stop_ids == (5,)


def test_the_tokenizers_own_stop_id_alone_as_in_the_release(directory):
    write_eos = directory / "generation_config.json"
    write_eos.write_text('{"eos_token_id": [7, 9]}')
    every, own = load_chat(directory), load_chat(directory, stop="tokenizer")
    assert set(own.stop_ids) == {own.tokenizer.eos_token_id}
    assert set(every.stop_ids) >= {7, 9, own.tokenizer.eos_token_id}
    assert every.identity() != own.identity() and own.identity() == load_chat(directory, stop="tokenizer").identity()


def test_no_stop_id_at_all_is_refused(directory):
    edit_json(directory / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="names an EOS token"):
        load_chat(directory)


def test_stop_ids_from_several_places_are_said_once(directory):
    eos = byte_tokenizer().eos_token_id
    edit_json(directory / "generation_config.json", eos_token_id=eos)
    edit_json(directory / "config.json", eos_token_id=[eos], vocab_size=TOKENS)
    assert load_chat(directory).notes == ()
    edit_json(directory / "generation_config.json", eos_token_id=[eos, 5])
    [note] = load_chat(directory).notes
    assert note == (
        f"a reply ends at any of the ids [5, {eos}], united from "
        f"tokenizer [{eos}], generation_config.json [5, {eos}], config.json [{eos}]"
    )
    assert load_chat(directory, stop="tokenizer").notes == ()


# --- Padding and the size of the vocabulary ---


def test_a_missing_padding_token_is_said(directory):
    edit_json(directory / "tokenizer_config.json", pad_token=None)
    edit_json(directory / "config.json", vocab_size=TOKENS)
    chat = load_chat(directory)
    assert chat.pad_id == chat.tokenizer.eos_token_id
    [note] = chat.notes
    assert f"no padding token: id {chat.pad_id} ({TURN_END}) stands in" in note


@pytest.mark.parametrize("rows", [TOKENS + 5, TOKENS + 133])
def test_a_head_with_more_rows_than_tokens(directory, rows):
    """As in Qwen2.5, whose heads have 151936 or 152064 rows for the same 151665 tokens."""
    edit_json(directory / "config.json", vocab_size=rows)
    chat = load_chat(directory)
    assert chat.vocab_size == TOKENS and chat.head_rows == rows
    assert chat.notes == (
        f"the last {rows - TOKENS} of the head's {rows} rows belong to no token and are never sampled",
    )


def test_a_head_as_large_as_the_vocabulary(checkpoint, directory):
    edit_json(directory / "config.json", vocab_size=TOKENS)
    assert load_chat(directory).notes == () and load_chat(directory).vocab_size == TOKENS


def test_the_head_of_a_wrapped_model(directory):
    edit_json(directory / "config.json", vocab_size=None, text_config={"vocab_size": TOKENS + 1})
    assert load_chat(directory).head_rows == TOKENS + 1


def test_without_a_config_the_head_is_not_known(directory):
    (directory / "config.json").unlink()
    chat = load_chat(directory)
    assert chat.head_rows is None and chat.vocab_size == TOKENS and chat.notes == ()


@pytest.mark.parametrize("rows", [TOKENS - 1, 200])
def test_tokens_beyond_the_head_are_refused(directory, rows):
    """Looked up on a device they would silently become the last row."""
    edit_json(directory / "config.json", vocab_size=rows)
    with pytest.raises(UserError, match=rf"lies beyond the {rows} rows of the model's head") as error:
        load_chat(directory)
    assert str(error.value).startswith(f"model.path: token {TOKENS - 1 if rows > 200 else rows} (")


def test_a_stop_id_beyond_the_head_is_refused(directory):
    edit_json(directory / "generation_config.json", eos_token_id=5000)
    with pytest.raises(UserError, match="token 5000 .* lies beyond the 264 rows"):
        load_chat(directory)


def test_a_placeholder_beyond_the_head_is_refused_only_in_text(directory):
    """Gemma's token for an image lies beyond the head of its text models."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)
    edit_json(directory / "config.json", vocab_size=TOKENS)
    chat = load_chat(directory)
    assert chat.vocab_size == TOKENS
    assert chat.notes == ("the model has no row for 1 token(s) of its tokenizer (<image>): text must not hold them",)
    assert chat.reply_ids(QUESTION, "4")
    for refused in (
        lambda: chat.prompt_ids([{"role": "user", "content": "see <image>"}]),
        lambda: chat.reply_ids(QUESTION, "<image>"),
    ):
        with pytest.raises(UserError, match="text holds the token '<image>', for which the model has no row"):
            refused()


# --- What cannot be a chat model's directory ---


def test_missing_tokenizer(directory):
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"model\.path: .* has no tokenizer_config\.json"):
        load_chat(directory)


def test_missing_chat_template(directory):
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_chat(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "Nonsense"}}'),
        ("tokenizer_config.json", "{{"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "{% for %}"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "two"}'),
    ],
)
def test_damaged_tokenizer_files_give_one_line(directory, name, content):
    (directory / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_chat(directory).prompt_ids(QUESTION)
    assert str(directory) in str(error.value) or "chat template" in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenizer_json_missing(directory):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_chat(directory)


def test_a_tokenizer_that_is_code_is_not_run(directory):
    """InternLM3's; with a tokenizer.json beside it there is nothing to run."""
    marker = directory / "ran"
    (directory / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert load_chat(directory).prompt_ids(QUESTION)
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(UserError, match=r"code of its own \(auto_map\).*put the tokenizer\.json there"):
        load_chat(directory)
    assert not marker.exists()
