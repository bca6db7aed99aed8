"""Over-long prompts, with the real tokenizer on real rows: counted, dropped, and never cut."""

import pytest
from task_rows import DATA

from unisd_jax.data.chat import load_chat
from unisd_jax.data.loading import load_items
from unisd_jax.data.pipeline import ViewMessages, fitting, tokenize
from unisd_jax.data.sources import Place
from unisd_jax.data.tasks import get_task
from unisd_jax.errors import UserError
from unisd_jax.teacher import student_messages, teacher_messages


@pytest.mark.parametrize("name", ["mbpp", "scienceqa", "gsm8k", "tooluse"])
def test_over_long_prompts_are_counted_and_dropped(smollm2_path, name):
    if not DATA.is_dir():
        pytest.skip(f"no benchmark data: {DATA} does not exist, UNISD_DATA names the folder")
    chat = load_chat(smollm2_path)
    items = load_items(get_task(name), "train", place=Place(path=DATA), limit=80).items
    students = [student_messages(item.prompt) for item in items]
    teachers = [teacher_messages(item.prompt, item.completion, condition="gold", placement="inline") for item in items]
    views = [ViewMessages(*pair) for pair in zip(students, teachers, strict=True)]
    counted = [
        max(
            len(chat.tokenizer.apply_chat_template(view, add_generation_prompt=True, return_dict=True)["input_ids"])
            for view in pair
        )
        for pair in zip(students, teachers, strict=True)
    ]
    limit = sorted(counted)[50]  # exactly as long as allowed is not too long
    kept, dropped = fitting(tokenize(items, views, chat), max_prompt_length=limit)
    expected = [item.id for item, length in zip(items, counted, strict=True) if length <= limit]
    assert [example.item.id for example in kept] == expected
    assert dropped.total() == len(items) - len(expected) > 0
    for example in kept:
        # Whole, from the first token of the template to the header of the reply.
        text = chat.tokenizer.decode(example.teacher)
        assert text.startswith("<|im_start|>system") and text.endswith("<|im_start|>assistant\n")
        assert example.item.prompt in text and example.item.completion in text
    with pytest.raises(UserError, match=f"data.max_prompt_length is {limit}; raise the limit"):
        fitting(tokenize(items, views, chat), max_prompt_length=limit, overlong="error")
