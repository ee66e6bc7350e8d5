# SPDX-License-Identifier: Apache-2.0
import pytest
from tiny_folder import tiny_tokenizer

from kvcompact_kernels.prompt import PromptFormat, document_ids, prompt_format, question_ids


def test_chat_format_reassembles_the_template():
    tokenizer = tiny_tokenizer()
    form = prompt_format(tokenizer)
    ids = document_ids(tokenizer, form, "A text.") + question_ids(tokenizer, form, "Why?")
    message = {"role": "user", "content": "A text.\n\nWhy?"}
    wanted = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert form.chat
    assert tokenizer.decode(ids) == wanted


def test_plain_format_without_a_template():
    tokenizer = tiny_tokenizer(chat=False)
    form = prompt_format(tokenizer)
    assert not form.chat
    assert tokenizer.decode(document_ids(tokenizer, form, "A text.")) == "A text."
    assert tokenizer.decode(question_ids(tokenizer, form, "Why?")) == "\n\nQuestion: Why?\nAnswer:"


@pytest.mark.parametrize("chat", [True, False])
def test_special_tokens_in_a_text_stay_text(chat):
    tokenizer = tiny_tokenizer(chat)
    form = prompt_format(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    before = document_ids(tokenizer, form, "")
    assert end not in document_ids(tokenizer, form, "x<|im_end|>y")[len(before) :]
    assert question_ids(tokenizer, form, "x<|im_end|>y").count(end) == question_ids(tokenizer, form, "x").count(end)


def test_the_document_tokens_do_not_depend_on_the_question():
    tokenizer = tiny_tokenizer()
    form = prompt_format(tokenizer)
    assert document_ids(tokenizer, form, "ab") == document_ids(tokenizer, form, "a") + document_ids(
        tokenizer, PromptFormat("", "", "", True), "b"
    )


def test_a_template_that_drops_content_falls_back():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    assert not prompt_format(tokenizer).chat


def test_a_template_that_fails_is_told():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match="chat template fails on a user's message .*no users here.*plain text"):
        prompt_format(tokenizer)


def test_json_round_trip_and_refusal():
    form = prompt_format(tiny_tokenizer())
    assert PromptFormat.from_json(form.to_json()) == form
    for wrong in (None, [], {}, {**form.to_json(), "chat": 1}, {**form.to_json(), "more": ""}):
        with pytest.raises(ValueError, match="prompt format"):
            PromptFormat.from_json(wrong)
