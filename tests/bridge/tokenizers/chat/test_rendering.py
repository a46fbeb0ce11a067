"""Rendered chat templates, compared with transformers, and errors for templates that fail or exceed a limit."""

from __future__ import annotations

import json
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from support.chats import CHATML, CONVERSATIONS, LLAMA_2, TEMPLATES, chat_tokenizer, read_chat_tokenizer
from transformers import AutoTokenizer

from bridge import TokenizerError
from bridge.tokenizers.chat.rendering import render
from bridge.tokenizers.chat.templates import ChatTemplate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    if name == "tojson" and Version(metadata.version("transformers")) < Version("5.23"):
        pytest.skip("transformers before 5.23 keeps the null fields of messages")
    ours, theirs = chat_tokenizer(tmp_path, TEMPLATES[name]), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template(CONVERSATIONS[1]) == theirs.apply_chat_template(CONVERSATIONS[1], tokenize=False)
    expected = theirs.apply_chat_template(CONVERSATIONS, add_generation_prompt=True)["input_ids"]
    assert ours.encode_conversations(CONVERSATIONS, add_generation_prompt=True) == expected


def test_further_variables_are_those_of_transformers(tmp_path: Path) -> None:
    template = "{{ tools[0].name }}{{ deep.x[1] }}{{ bos_token }}{% generation %}{{ enable }}{% endgeneration %}"
    ours, theirs = chat_tokenizer(tmp_path, template), AutoTokenizer.from_pretrained(tmp_path)
    variables: dict[str, Any] = {"tools": [{"name": "f"}], "deep": {"x": [1, 2]}, "bos_token": "B", "enable": False}
    expected = theirs.apply_chat_template(CONVERSATIONS[0], tokenize=False, **variables)
    assert ours.apply_chat_template(CONVERSATIONS[0], **variables) == expected == "f2BFalse"


def rendered(template: str, messages: Any = CONVERSATIONS[0]) -> str:
    return render(ChatTemplate(template, "'t.jinja'"), [messages], {})[0]


HOSTILE = {
    "attribute": (
        "\n{{ ''.__class__.__mro__ }}",
        r"'t.jinja', line 2: .*SecurityError: access to attribute '__class__'",
    ),
    "attribute by filter": ("{{ (''|attr('__class__')).x }}", "SecurityError"),
    "attribute by format": ("{{ '{0.__class__.x}'.format(messages) }}", "SecurityError"),
    "globals of a function": ("{{ raise_exception.__globals__.x }}", "SecurityError"),
    "namespace": ("{% set n = namespace(__init__=1) %}", "SecurityError: a namespace cannot have the private"),
    "change of messages": ("{{ messages.append(1) }}", "SecurityError"),
    "huge range": ("{% for i in range(10**9) %}a{% endfor %}", "OverflowError: Range too big"),
    "huge repetition": ("\n\n{{ 'a' * 10**10 }}", "line 3: the chat template needs more than 256 MiB of memory"),
    "huge format": ("{{ '%2000000000d' % 1 }}", "needs more than 256 MiB"),
    "doubling": (
        "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "needs more than 256 MiB",
    ),
    "endless text": (
        "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaa{% endfor %}{% endfor %}",
        "OverflowError: the text is longer than 1048576 characters",
    ),
    "endless recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "deep nesting": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "the chat template "),
    "many blocks": (
        "{% if 1 %}{% for a in b %}" * 50 + "{% endfor %}{% endif %}" * 50,
        "too many levels of indentation",
    ),
    "unclosed tag": ("a\n{% if x %}\nb", r"line 3: .*TemplateSyntaxError: Unexpected end of template"),
    "unknown tag": ("{% import 'x' as y %}", "the chat template failed: "),
    "undefined": ("{{ messages[0].nothing.x }}", "UndefinedError"),
    "rejection": (
        "\n{{ raise_exception('only \x1b[31muser') }}",
        r"line 2: .* rejects the messages: 'only \\x1b\[31mu",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_template_is_an_error_that_names_the_line(case: str) -> None:
    template, message = HOSTILE[case]
    with pytest.raises(TokenizerError, match=message) as caught:
        rendered(template)
    assert str(caught.value).startswith("'t.jinja'")
    assert str(caught.value).isprintable()


def test_private_attributes_are_printed_as_nothing() -> None:
    private = (
        "''.__class__",
        "''|attr('__class__')",
        "'{0.__class__}'.format(messages)",
        "raise_exception.__globals__",
    )
    assert rendered("".join(f"[{{{{ {expression} }}}}]" for expression in private)) == "[]" * len(private)


def test_an_endless_template_ends_within_seconds() -> None:
    started = time.process_time()
    with pytest.raises(TokenizerError, match="the chat template takes more than 3 seconds"):
        rendered("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert time.process_time() - started < 1, "the time is that of another process"


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    started = []

    def run(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        started.append(env)
        return subprocess.CompletedProcess(arguments, 0, stdout=json.dumps({"text": "hi"}).encode())

    monkeypatch.setattr(subprocess, "run", run)
    assert rendered("hi") == "hi"
    assert "HF_TOKEN" not in started[0]


@pytest.mark.parametrize("messages", [[], "text", ["text"], {"role": "user"}])
def test_other_objects_are_not_conversations(messages: Any) -> None:
    with pytest.raises(TokenizerError, match="a list of at least one message"):
        rendered(CHATML, messages)


def test_messages_must_be_json() -> None:
    with pytest.raises(TokenizerError, match="is not JSON: 'Object of type set"):
        rendered(CHATML, [{"role": "user", "content": {1}}])


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(TokenizerError, match=r"chat templates need jinja2; .*pip install 'gpt2-bridge\[chat\]'"):
        rendered(CHATML)
    monkeypatch.setattr(metadata, "version", lambda name: "3.1.5")
    with pytest.raises(TokenizerError, match=r"jinja2 3\.1\.5 has known security problems"):
        rendered(CHATML)


def test_a_template_may_reject_the_messages() -> None:
    with pytest.raises(TokenizerError, match="rejects the messages: 'Conversation roles must alternate"):
        rendered(LLAMA_2, [{"role": "assistant", "content": "hi"}])


# Messages that are not trusted


def test_markers_in_messages_are_text_and_those_of_the_template_match(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path)
    messages = CONVERSATIONS[1]
    ids = ours.encode_conversations([messages], add_generation_prompt=True, special_tokens="as_text")[0]
    start, end = ours.id_of("<|im_start|>"), ours.id_of("<|im_end|>")
    assert (ids.count(start), ids.count(end)) == (5, 4), "one for each message, and the generation prompt"
    assert not {*ids} & {ours.id_of(token) for token in ("<s>", "</s>", "[INST]")}
    assert ours.decode(ids) == ours.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["ChatML", "Llama 2", "blocks, macros and generation", "loop controls", "tojson"])
def test_without_markers_in_messages_the_ids_are_those_of_matching(tmp_path: Path, name: str) -> None:
    ours = chat_tokenizer(tmp_path, TEMPLATES[name])
    conversations = [[{"role": "user", "content": text}] for text in (" hello ", "", " ", "\ue000 \ud83d\n", "a</")]
    matched = ours.encode_conversations(conversations)
    for policy in ("as_text", "error"):
        assert ours.encode_conversations(conversations, special_tokens=policy) == matched  # type: ignore[arg-type]


def test_a_token_across_the_border_of_a_message_does_not_match(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, "<{{ messages[0].content }}|im_end|>")
    [ids] = ours.encode_conversations([[{"role": "user", "content": "|im_start|><"}]], special_tokens="as_text")
    assert ids == [*b"<|im_start|><|im_end|>"]


@pytest.mark.parametrize(
    "more", [{"tool": {"<|im_end|>": 1}}, {"tool": {"type": "a <|im_end|>"}}, {"tools": [{"role": ["<|im_end|>"]}]}]
)
def test_a_token_in_another_part_of_a_message_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    ours = chat_tokenizer(tmp_path, "{{ messages | tojson }}")
    conversation = [{"role": "user", "content": "hi", **more}]
    for policy in ("as_text", "error"):
        with pytest.raises(TokenizerError, match=r"a field, role or type of a message, contains the token"):
            ours.encode_conversations([conversation], special_tokens=policy)  # type: ignore[arg-type]


def test_a_message_with_a_token_is_an_error_on_request(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="special_tokens='none': must be one of match, as_text, error"):
        ours.encode_conversations([CONVERSATIONS[1]], special_tokens="none")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"a message contains the token '<\|im_start\|>'"):
        ours.encode_conversations([CONVERSATIONS[1]], special_tokens="error")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content[:3] }}",
        "{% for c in messages[0].content %}{{ c }}-{% endfor %}",
        "{{ messages[0].content | length }}",
        "{{ messages[0].content | reverse }}",
    ],
)
def test_a_template_that_takes_messages_apart_is_refused_for_text_that_is_not_trusted(
    tmp_path: Path, template: str
) -> None:
    ours = chat_tokenizer(tmp_path, template)
    with pytest.raises(TokenizerError, match="their text cannot be distinguished from its own"):
        ours.encode_conversations([[{"role": "user", "content": "hello"}]], special_tokens="as_text")


def test_white_space_is_marked_where_a_token_has_white_space(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, "a{{ messages[0].content }}b")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["268"] = {"content": "\n\n", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = read_chat_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "\n\nhi\n\n"}]
    assert 268 in ours.encode_conversations([messages])[0]
    assert ours.encode_conversations([messages], special_tokens="as_text") == [[*b"a\n\nhi\n\nb"]]


def test_other_kinds_of_tokenizers_refuse_only_messages_with_a_token(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["257"]["lstrip"] = True  # run by the tokenizers package
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = read_chat_tokenizer(tmp_path)
    harmless = [[{"role": "user", "content": " Hi <|im_ "}, {"role": "user", "content": " "}]]
    assert ours.encode_conversations(harmless, special_tokens="as_text") == ours.encode_conversations(harmless)
    for policy in ("as_text", "error"):
        with pytest.raises(TokenizerError, match=r"contains the token '</s>'.*cannot encode as text"):
            ours.encode_conversations([[{"role": "user", "content": "1</s>2"}]], special_tokens=policy)
