"""`gpt2 diff`: how two checkpoints differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from gpt2_jax.cli.arguments import READING, HtmlFile, JsonFile, SourceFlags, given_text
from gpt2_jax.cli.effect import Rule, defaults_of, require_effect
from gpt2_jax.console.output import report_writer, status_bar
from gpt2_jax.console.terminal import console

RULES = (
    Rule(("overwrite",), lambda values: values["json"] is None and values["html"] is None, "without --json or --html"),
    Rule(("text", "text_file", "batch_size", "seq_len"), lambda values: not values["function"], "with --no-function"),
)


def diff(
    first: Annotated[Positional[str], arg(metavar="A")],
    second: Annotated[Positional[str], arg(metavar="B")],
    /,
    *,
    function: bool = True,
    text: Annotated[str | None, arg(metavar="TEXT")] = None,
    text_file: Annotated[Path | None, arg(metavar="FILE")] = None,
    batch_size: int = 2,
    seq_len: int = 256,
    reading_a: Annotated[SourceFlags, arg(name="a")] = READING,
    reading_b: Annotated[SourceFlags, arg(name="b")] = READING,
    json: JsonFile = None,
    html: HtmlFile = None,
    overwrite: bool = False,
) -> int:
    """Show how two checkpoints differ: configuration, tokenizer, generation settings, tensors, optimizer and function.

    Exit code 0 if they are identical, or if nothing that differs changes what the model computes or how it reads and
    generates text. Exit code 1 if they are different. Two steps of a run are RUN/checkpoints/STEP.

    Example: gpt2 diff ./my-gpt2 my-gpt2.gguf --json diff.json --html diff.html

    Args:
        first: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        second: the other checkpoint.
        function: run both models in JAX, unless their configurations and weights are identical.
        text: the text to run the models on, instead of text that the bundled model has not seen. It is encoded with
            the tokenizer of A or, if A has none, with that of B.
        text_file: a UTF-8 file with that text.
        batch_size: sequences to run the models on.
        seq_len: tokens per sequence; at most the n_positions of both models are used.
        reading_a: how A is read.
        reading_b: how B is read.
        json: also write the result, with every difference, to this file.
        html: also write the result with plots as a page for a browser, in one file without scripts.
        overwrite: replace the report or the page of an earlier command.
    """
    require_effect(locals(), defaults_of(diff), RULES)
    write = report_writer(json, html, overwrite, (first, second, reading_a.base, reading_b.base, text_file))
    text = given_text(text, text_file)
    a, b = reading_a.load(first), reading_b.load(second)
    from gpt2_jax.diff import diff as run
    from gpt2_jax.diff.report import show

    with status_bar() as say:
        result = run(
            a,
            b,
            sources=(first, second),
            function=function,
            text=text,
            batch_size=batch_size,
            seq_len=seq_len,
            fingerprints=json is not None or html is not None,
            progress=say,
        )
    show(result, console())
    write(result)
    return 1 if result.verdict == "different" else 0
