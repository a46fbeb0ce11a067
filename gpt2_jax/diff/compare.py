"""`diff`: compare two checkpoints, and run them if their weights or configurations differ."""

from __future__ import annotations

from collections.abc import Callable

from bridge import Checkpoint
from bridge.comparison import Comparison, compare
from gpt2_jax.diff.result import Diff, Side


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    sources: tuple[str, str] = ("A", "B"),
    function: bool = True,
    text: str | None = None,
    batch_size: int = 2,
    seq_len: int = 256,
    fingerprints: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Diff:
    """Compare two checkpoints: configuration, tokenizer, generation settings, tensors, optimizer and function.

    >>> import bridge
    >>> bundled = bridge.load("bundled")
    >>> diff(bundled, bundled).verdict
    'identical'

    Args:
        a, b: the checkpoints, in any formats.
        sources: their names in the report.
        function: run both models if the comparison of configurations and tensors does not show that they are identical.
        fingerprints: also compute the fingerprints of both, which reads the weights once more.
        text, batch_size, seq_len: as in `compare_functions`.
        progress: called with the name of each step or tensor before it is read.

    Raises:
        BridgeError: a file of a checkpoint is damaged or not supported, or the arguments are invalid.
    """
    found = compare(a, b, progress)
    sides = Side.of(a, sources[0], fingerprints), Side.of(b, sources[1], fingerprints)
    if found.has_identical_model:
        return Diff(*sides, found, None, "the configurations and the weights give the same function")
    if not function:
        return Diff(*sides, found, None, "not requested")
    from gpt2_jax.diff.function import compare_functions

    result = compare_functions(
        a,
        b,
        text=text,
        text_from_b=_only_b_has_a_tokenizer(found),
        batch_size=batch_size,
        seq_len=seq_len,
        progress=progress,
    )
    return Diff(*sides, found, None, result) if isinstance(result, str) else Diff(*sides, found, result)


def _only_b_has_a_tokenizer(found: Comparison) -> bool:
    return [*found.tokenizer.missing] == ["A"]
