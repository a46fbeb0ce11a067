"""The tokens that a post-processor of a `tokenizer.json` puts around every text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Around = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids before and after a text."""

NOTHING: Around = ((), ())


def around_of(post_processor: Any) -> Around | None:
    """Return the ids that a post-processor puts around a text, or None for a post-processor that does more."""
    if post_processor is None:
        return NOTHING
    if not isinstance(post_processor, dict):
        return None
    match post_processor:
        case {"type": "ByteLevel"}:
            return NOTHING
        case {"type": "BertProcessing" | "RobertaProcessing", "sep": [str(), int(sep)], "cls": [str(), int(cls)]}:
            return (cls,), (sep,)
        case {"type": "Sequence", "processors": list(processors)}:
            before: tuple[int, ...] = ()
            after: tuple[int, ...] = ()
            for each in processors:
                if (found := around_of(each)) is None:
                    return None
                before, after = found[0] + before, after + found[1]
            return before, after
        case {"type": "TemplateProcessing", "single": list(single), "special_tokens": dict(special)}:
            return _around_of_template(single, special)
    return None


def ids_of(post_processor: Any) -> Iterator[Any]:
    """Yield the ids that a post-processor adds to a text. They are not validated."""
    match post_processor:
        case {"type": "BertProcessing" | "RobertaProcessing", "sep": [_, sep], "cls": [_, cls]}:
            yield from (cls, sep)
        case {"type": "Sequence", "processors": list(processors)}:
            for each in processors:
                yield from ids_of(each)
        case {"type": "TemplateProcessing", "single": list(single), "special_tokens": dict(special)}:
            for part in single:
                match part:
                    case {"SpecialToken": {"id": str(token)}} if isinstance(special.get(token), dict):
                        ids = special[token].get("ids")
                        yield from ids if isinstance(ids, list) else ()


def _around_of_template(single: Sequence[Any], special: Mapping[str, Any]) -> Around | None:
    sides: list[tuple[int, ...]] = [()]
    for part in single:
        match part:
            case {"Sequence": {"id": "A"}} if len(sides) == 1:
                sides.append(())
            case {"SpecialToken": {"id": str(token)}}:
                match special.get(token):
                    case {"ids": [*ids]} if all(type(i) is int for i in ids):
                        sides[-1] += tuple(ids)
                    case _:
                        return None
            case _:
                return None
    return (sides[0], sides[1]) if len(sides) == 2 else None


def around_template(around: tuple[Sequence[int], Sequence[int]], spelling: Mapping[int, str]) -> dict[str, Any] | None:
    """Return the post-processor that puts these ids around a text, or None for no ids."""
    before, after = around
    if not before and not after:
        return None
    return template(
        [spelling[i] for i in before], [spelling[i] for i in after], {spelling[i]: i for i in (*before, *after)}
    )


def template(before: Sequence[str], after: Sequence[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return a `TemplateProcessing` that puts tokens around a text."""

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": token, "type_id": type_id}} for token in before),
            {"Sequence": {"id": sequence, "type_id": type_id}},
            *({"SpecialToken": {"id": token, "type_id": type_id}} for token in after),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()},
    }
