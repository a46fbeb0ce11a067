"""The assistant's part of a rendered conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chats import BLOCKS, CHATML, LLAMA_2, chat_tokenizer

from bridge import TokenizerError
from bridge.tokenizers.chat.turns import Segment, UnstableTemplateError, render_turns

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "3?"},
]


def texts(segments: object) -> list[tuple[str, bool]]:
    assert isinstance(segments, list) and all(isinstance(segment, Segment) for segment in segments)
    return [(segment.text, segment.is_reply) for segment in segments]


def test_chatml(tmp_path: Path) -> None:
    [found] = render_turns(chat_tokenizer(tmp_path, CHATML), [CHAT])
    assert texts(found) == [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("One.<|im_end|>\n", True),
        ("<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Two.<|im_end|>\n", True),
        ("<|im_start|>user\n3?<|im_end|>\n", False),
    ]


def test_a_template_without_a_generation_prompt(tmp_path: Path) -> None:
    [found] = render_turns(chat_tokenizer(tmp_path, LLAMA_2), [CHAT[1:5]])
    assert texts(found) == [
        ("<s>[INST] 1? [/INST]", False),
        (" One. <|im_end|>", True),
        ("<s>[INST] 2? [/INST]", False),
        (" Two. <|im_end|>", True),
    ]


def test_the_parts_together_are_the_rendered_conversation(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, LLAMA_2)
    for trust in (True, False):
        [found] = render_turns(tokenizer, [CHAT], trust_messages=trust)
        assert "".join(text for text, _ in texts(found)) == tokenizer.apply_chat_template(CHAT)


def test_the_text_of_messages_is_not_trusted(tmp_path: Path) -> None:
    [found] = render_turns(chat_tokenizer(tmp_path), [CHAT[1:3]], trust_messages=False)
    assert not isinstance(found, TokenizerError)
    untrusted = [text for segment in found for text, is_trusted in segment.parts if not is_trusted]
    assert untrusted == ["1?", "One."]


@pytest.mark.parametrize(
    "template",
    [
        BLOCKS,  # puts a separator before each message but the first, also before the generation prompt
        "{{ messages | length }}" + CHATML,
        "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}",
        CHATML.replace("assistant", "bot"),
    ],
    ids=["blocks", "counts", "last", "another role"],
)
def test_a_template_that_changes_the_beginning_is_refused(tmp_path: Path, template: str) -> None:
    [found] = render_turns(chat_tokenizer(tmp_path, template), [CHAT])
    assert isinstance(found, UnstableTemplateError)
    assert "chat_template.jinja': the chat template changes the beginning of a conversation" in str(found)


@pytest.mark.thorough
def test_one_conversation_that_is_rejected_does_not_affect_the_others(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, LLAMA_2)
    wrong = [CHAT[1], CHAT[1], CHAT[2]]
    slow = "{% if messages[0].content == 'slow' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    tokenizer = chat_tokenizer(tmp_path, slow + "{% endfor %}{% endif %}" + LLAMA_2)
    late = [{"role": "user", "content": "slow"}, CHAT[2]]
    found = render_turns(tokenizer, [CHAT[1:3], wrong, late, CHAT[1:3]])
    assert texts(found[0]) == texts(found[3]) and len(texts(found[0])) == 2
    assert "rejects the messages" in str(found[1])
    assert "takes more than 3 seconds" in str(found[2])


def test_a_tokenizer_without_a_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no chat template"):
        render_turns(chat_tokenizer(tmp_path, None), [CHAT])
