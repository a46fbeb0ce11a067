"""Names of parameters and modules: what differs by convention, and the mapping that a user gives."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from bridge import BridgeError
from bridge.errors import bullet_list, quoted


class MatchError(BridgeError):
    """Names cannot be matched. The message shows the candidates and the mapping to give."""


def normalised(name: str, *, is_parameter: bool = True) -> tuple[str, ...]:
    """The words of a name, without what differs by convention.

    >>> normalised("transformer.h.0.attn.c_proj.weight") == normalised("transformer/h_0/attn/c_proj/kernel")
    True
    >>> normalised("layers.0.ln.scale")
    ('layers', '0', 'ln', 'weight')
    """
    path, _, leaf = name.replace("/", ".").rpartition(".") if is_parameter else (name.replace("/", "."), "", "")
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|:\w+", path)]
    for k, word in enumerate(words[:-1]):
        if word in _LAYERS and words[k + 1].isdigit():
            words[k] = "layers"
    return (*words, _LEAVES.get(leaf, leaf)) if is_parameter else tuple(words)


_LAYERS = {"h", "layer", "layers", "block", "blocks"}
_LEAVES = {
    **dict.fromkeys(("kernel", "scale", "embedding", "weight", "w", "gamma"), "weight"),
    **dict.fromkeys(("bias", "b", "beta"), "bias"),
    **dict.fromkeys(("mean", "running_mean"), "mean"),
    **dict.fromkeys(("var", "running_var"), "var"),
}
KNOWN_ROLES = frozenset(_LEAVES.values())
"""The last words of `normalised` that tell the role of a parameter."""
_WRAPPERS = {"model", "module", "transformer", "backbone", "net", "params", "orig", "mod", "base"}


def without_wrappers(words: tuple[str, ...]) -> tuple[str, ...]:
    """Drop leading words such as `model`, which wrap a whole model."""
    while len(words) > 1 and words[0] in _WRAPPERS:
        words = words[1:]
    return words


def role_name(name: str) -> str:
    """The last part of a name, such as `weight`."""
    return name.replace("/", ".").rpartition(".")[2]


def renaming(
    names: Mapping[str, str | None], left: Iterable[str], right: Iterable[str]
) -> tuple[Callable[[str], str], Callable[[str], bool]]:
    """Return functions that rename a left name by the user's mapping, and that tell whether it is excluded.

    Raises:
        MatchError: a name is unknown on its side, or two names are mapped to one.
    """
    left, right = [*left], [*right]
    problems = [
        f"{quoted(name)} is not a name of the {side} side{closest(name, known)}"
        for side, known, given in (("left", left, names), ("right", right, [n for n in names.values() if n]))
        for name in given
        if not any(is_below(other, name) for other in known)
    ]
    twice = [name for name, count in Counter(n for n in names.values() if n).items() if count > 1]
    problems += [f"{quoted(name)} is the right side of two entries" for name in twice]
    if problems:
        raise MatchError("names is not a valid mapping:\n" + bullet_list(problems))
    ordered = sorted(names.items(), key=lambda item: -len(item[0]))

    def rename(name: str) -> str:
        for prefix, other in ordered:
            if other is not None and is_below(name, prefix):
                return other + name[len(prefix) :]
        return name

    return rename, lambda name: any(other is None and is_below(name, prefix) for prefix, other in ordered)


def closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith((f"{prefix}.", f"{prefix}/", f"{prefix}:", f"{prefix}[", f"{prefix}#"))
