# SPDX-License-Identifier: Apache-2.0
"""How a document and a later question meet in one prompt.

The document opens the user's turn and is compacted before any question is known; the question closes the turn::

    [template up to the content] document | question [rest of the template, opening of the answer]
                    compacted             |  read with the question

The tokens left and right of the bar are encoded apart, so their join never depends on the question.
"""

from dataclasses import asdict, dataclass
from typing import Any

_DOCUMENT, _QUESTION = "\x00document\x00", "\x00question\x00"
PLAIN_BETWEEN, PLAIN_AFTER = "\n\nQuestion: ", "\nAnswer:"


@dataclass(frozen=True)
class PromptFormat:
    """The fixed texts of a prompt: ``before + document + between + question + after``.

    ``before`` of a chat template holds its special tokens as text; without a template the tokenizer adds its own.
    """

    before: str
    between: str
    after: str
    chat: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "PromptFormat":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: it is something else.
        """
        wanted = {"before": str, "between": str, "after": str, "chat": bool}
        if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != wanted:
            raise ValueError(f"the prompt format must hold {', '.join(wanted)}, got {value!r}")
        return cls(**value)


def prompt_format(tokenizer: Any) -> PromptFormat:
    """The format of the tokenizer's chat template, or a plain one when it has none that holds both texts.

    Raises:
        ValueError: the template cannot be used.
    """
    if getattr(tokenizer, "chat_template", None):
        message = {"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}
        try:
            text = tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a template is a program
            raise ValueError(
                f"the tokenizer's chat template fails on a user's message ({type(error).__name__}: {error}); without a "
                "template (chat_template None) prompts are plain text"
            ) from error
        if text.count(_DOCUMENT) == 1 and text.count(_QUESTION) == 1:
            before, rest = text.split(_DOCUMENT)
            between, after = rest.split(_QUESTION)
            return PromptFormat(before, between, after, True)
    return PromptFormat("", PLAIN_BETWEEN, PLAIN_AFTER, False)


def document_ids(tokenizer: Any, form: PromptFormat, document: str) -> list[int]:
    """Tokens that are compacted. Special tokens written in the document stay ordinary text."""
    if form.chat:
        opening = tokenizer(form.before, add_special_tokens=False).input_ids
    else:
        bos = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
        opening = [] if bos is None else [bos]
    return opening + _ordinary(tokenizer, document)


def question_ids(tokenizer: Any, form: PromptFormat, question: str) -> list[int]:
    """Tokens that follow the compacted ones: the question and the opening of the answer."""
    parts = [_ordinary(tokenizer, form.between + question)] if not form.chat else []
    if form.chat:
        parts.append(tokenizer(form.between, add_special_tokens=False).input_ids if form.between else [])
        parts.append(_ordinary(tokenizer, question))
        parts.append(tokenizer(form.after, add_special_tokens=False).input_ids)
    else:
        parts.append(_ordinary(tokenizer, form.after))
    return [token for part in parts for token in part]


def _ordinary(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
