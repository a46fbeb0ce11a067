"""`gpt2 verify`: check that both backends compute the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from tyro.conf import arg

import bridge
from bridge import Checkpoint
from bridge.errors import quoted
from bridge.io import local_path
from gpt2_jax.cli.arguments import (
    BUNDLED,
    READING,
    HtmlFile,
    JsonFile,
    Reading,
    SourceFlags,
    SourceOrBundled,
    given_text,
)
from gpt2_jax.cli.effect import Rule, defaults_of, require_effect
from gpt2_jax.console.output import Reportable, progress, report_writer, require_torch
from gpt2_jax.console.report_files import require_report_path
from gpt2_jax.console.terminal import console

if TYPE_CHECKING:
    from gpt2_jax.parity import Report

CheckName = Literal[
    "logits",
    "hidden-states",
    "gradients",
    "training",
    "padding",
    "round-trip",
    "prediction",
    "transformers",
    "tokenizer",
    "generation",
    "classification",
    "batch-invariance",
]
CertifiedCheckName = Literal[
    "weights", "configuration", "logits", "hidden-states", "losses", "gradients", "padding", "float32"
]
AnyCheckName = Literal[CheckName, CertifiedCheckName]
Precision = Literal["default", "high", "highest"]
ALL_CHECKS: tuple[CheckName, ...] = CheckName.__args__  # type: ignore[attr-defined]
ALL_CERTIFIED_CHECKS: tuple[CertifiedCheckName, ...] = CertifiedCheckName.__args__  # type: ignore[attr-defined]

FILE_RULES = (
    Rule(
        ("overwrite",),
        lambda v: v["json"] is None and v["html"] is None and v["certificate"] is None,
        "without --json, --html or --certificate",
    ),
    Rule(("precision", "public_key"), lambda v: v["against"] is None, "without --against"),
    Rule(("signing_key",), lambda v: v["certificate"] is None, "without --certificate"),
    Rule(
        ("text", "text_file", "batch_size", "seq_len", "seed", "untrained"),
        lambda v: v["against"] is not None,
        "with --against, which reads the tokens from the certificate",
    ),
)
RULES = (Rule(("untrained",), lambda v: "prediction" not in v["checks"], "without the check of predictions"),)


def verify(
    source: SourceOrBundled = BUNDLED,
    /,
    *,
    reading: Reading = READING,
    text: Annotated[str | None, arg(metavar="TEXT")] = None,
    text_file: Annotated[Path | None, arg(metavar="FILE")] = None,
    batch_size: int = 2,
    seq_len: Annotated[int | None, arg(help_behavior_hint="(default: reaches the second half of n_positions)")] = None,
    seed: int = 0,
    untrained: bool = False,
    checks: Annotated[tuple[AnyCheckName, ...] | None, arg(help_behavior_hint="(default: all that apply)")] = None,
    certificate: Annotated[Path | None, arg(metavar="FILE")] = None,
    against: Annotated[Path | None, arg(metavar="FILE")] = None,
    precision: Precision = "highest",
    signing_key: Annotated[Path | None, arg(metavar="PEM")] = None,
    public_key: Annotated[Path | None, arg(metavar="PEM")] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
    overwrite: bool = False,
) -> int:
    """Check that PyTorch and JAX compute the same function with this checkpoint and give the same text.

    Exit code 0 if at least one check ran and every check that ran passed. A check that cannot run is skipped. A
    sequence classifier is checked with its head, unless --drop-extra-heads is given.

    With --certificate, the outputs of PyTorch are written to a file if all checks pass. With --against, JAX is checked
    against this file, without PyTorch.

    Example: gpt2 verify ./my-gpt2 --json report.json --html report.html

    Args:
        source: a checkpoint in any format, a run, a Hugging Face id, or `bundled`.
        reading: how SRC is read.
        text: the text to run the models on, instead of the built-in text. If the tokenizer lacks more than a tenth of
            the built-in text's characters, the default is random characters, and predictions are not checked.
        text_file: a UTF-8 file with that text.
        batch_size: sequences in the batch.
        seq_len: tokens per sequence; at most n_positions are used. The default is at least 384, and 64 more than half
            of n_positions.
        seed: the seed of random ids, for a checkpoint without a tokenizer, or of random characters.
        untrained: the weights are random, so do not check that they predict text.
        checks: run only these. weights, configuration, losses and float32 need --against, which has no training,
            round-trip, prediction, transformers, tokenizer, generation, classification and batch-invariance.
            batch-invariance runs only if it is named here, and limits JAX to one thread.
        certificate: if all checks pass, write a certificate to this file: the tokens, and PyTorch's float64 outputs.
        against: check JAX alone against this certificate. Needs no PyTorch.
        precision: the precision of JAX's float32 matrix products in the check float32 of --against.
        signing_key: sign the certificate, and SRC's files, with this private key, in the format of OpenSSF Model
            Signing. Writes FILE.sig and FILE.checkpoint.sig.
        public_key: with --against, require both signatures by this key.
        json: also write the report to this file.
        html: also write the report with plots as a page for a browser, in one file without scripts.
        overwrite: replace the report, the page, the certificate or the signatures of an earlier command.
    """
    require_effect(locals(), defaults_of(verify), FILE_RULES)
    if against is None:
        require_torch("gpt2 verify")
    write = report_writer(json, html, overwrite, (source, reading.base, text_file, against))
    _require_allowed_checks(checks, certificate, against)
    if against is not None:
        return _verify_against(source, reading, against, precision, checks, public_key, write)
    text = given_text(text, text_file)
    options: dict[str, Any] = {
        "source": source,
        "text": text,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "seed": seed,
        "untrained": untrained,
    }
    if certificate is not None:
        _require_certificate_path(certificate, overwrite, (source, reading.base, text_file), (json, html))
        checkpoint = reading.load(source)
        if signing_key is None:
            return _certify(checkpoint, certificate, overwrite, options, write)
        signed = _signed_directory(source, reading, checkpoint)
        _require_signable(certificate, signing_key, overwrite)
        code = _certify(checkpoint, certificate, overwrite, options, write)
        if code == 0:
            _sign(certificate, signed, signing_key, (json, html), overwrite)
        return code
    model = reading.load_with_classifier(source)
    from gpt2_jax.parity import checks_for
    from gpt2_jax.parity import verify as run

    names = checks_for(model) if checks is None else checks
    require_effect({"untrained": untrained, "checks": names}, defaults_of(verify), RULES)
    with progress_bar(names) as begin:
        report = run(model, **options, checks=names, progress=begin)
    return finish(report, write)


def _require_allowed_checks(checks: tuple[str, ...] | None, certificate: Path | None, against: Path | None) -> None:
    if certificate is not None and against is not None:
        raise bridge.BridgeError("--certificate and --against are mutually exclusive; give one")
    if checks is None:
        return
    if certificate is not None:
        raise bridge.BridgeError("--certificate needs all checks; leave out --checks")
    allowed: tuple[str, ...] = ALL_CHECKS if against is None else ALL_CERTIFIED_CHECKS
    if not checks:
        raise bridge.BridgeError(f"--checks needs at least one of {', '.join(allowed)}")
    if unknown := [name for name in checks if name not in allowed]:
        mode = "without" if against is None else "with"
        raise bridge.BridgeError(
            f"--checks {unknown[0]}: {mode} --against, the checks are {', '.join(allowed)}; leave it out"
        )


def _require_certificate_path(
    file: Path, overwrite: bool, inputs: Iterable[str | Path | None], reports: tuple[Path | None, Path | None]
) -> None:
    from gpt2_jax.parity.certificates.certificate import is_certificate

    for flag, report in zip(("--json", "--html"), reports, strict=True):
        if report is not None and report.resolve() == file.resolve():
            raise bridge.BridgeError(f"--certificate and {flag} both name {quoted(file)}; give two files")
    require_report_path(file, overwrite=overwrite, inputs=inputs, kind="certificate", is_own=is_certificate)


def _signed_directory(source: str, reading: SourceFlags, checkpoint: Checkpoint) -> Path:
    """The directory to sign. Of a run, only the checkpoint that was read is signed."""
    if reading.base is not None:
        raise bridge.BridgeError("signatures do not cover --base; merge the adapter first, with gpt2 convert")
    read = checkpoint.source
    path = read if read is not None and read.is_dir() else local_path(source)
    if not path.is_dir():  # its configuration, its tokenizer or its other shards may be in files beside it
        raise bridge.BridgeError(f"{quoted(source)} is a file, and signatures cover directories; give its directory")
    return path


def _require_signable(certificate: Path, key: Path, overwrite: bool) -> None:
    """Check that the signatures can be written, before the work starts."""
    from gpt2_jax.parity.certificates.signatures import is_signature_by, require_private_key, signature_paths

    require_private_key(key)
    for signature in signature_paths(certificate):
        require_report_path(
            signature, overwrite=overwrite, kind="signature", is_own=lambda file: is_signature_by(file, key)
        )


def _sign(certificate: Path, checkpoint: Path, key: Path, reports: Iterable[Path | None], overwrite: bool) -> None:
    from gpt2_jax.parity.certificates.signatures import sign_certificate

    ignored = [report for report in reports if report is not None]
    for signature in sign_certificate(certificate, checkpoint, key, ignored=ignored, overwrite=overwrite):
        console().print(f"signature: {quoted(signature)}", soft_wrap=True, highlight=False)


def _certify(
    checkpoint: Checkpoint,
    file: Path,
    overwrite: bool,
    options: dict[str, Any],
    write: Callable[[Reportable], None],
) -> int:
    """Run all checks, and write the certificate if they pass."""
    from gpt2_jax.parity import certify, checks_for, write_certificate

    with progress_bar((*checks_for(checkpoint), "certificate")) as begin:
        report, certificate = certify(checkpoint, **options, progress=begin)
    code = finish(report, write)
    if certificate is not None:
        write_certificate(certificate, file, overwrite=overwrite)
        console().print(f"certificate: {quoted(file)}, {file.stat().st_size:,} bytes", soft_wrap=True, highlight=False)
    return code


def _verify_against(
    source: str,
    reading: SourceFlags,
    file: Path,
    precision: Precision,
    checks: tuple[str, ...] | None,
    public_key: Path | None,
    write: Callable[[Reportable], None],
) -> int:
    """Check JAX against a certificate, whose signatures are verified first. Imports no PyTorch."""
    from gpt2_jax.parity import read_certificate, verify_against

    checkpoint = reading.load(source)
    if public_key is not None:
        _verify_signatures(file, _signed_directory(source, reading, checkpoint), public_key)
    certificate = read_certificate(file)
    names = ALL_CERTIFIED_CHECKS if checks is None else checks
    with progress_bar(names) as begin:
        report = verify_against(
            checkpoint, certificate, source=source, precision=precision, checks=names, progress=begin
        )
    return finish(report, write)


def _verify_signatures(certificate: Path, checkpoint: Path, key: Path) -> None:
    from gpt2_jax.parity.certificates.signatures import signature_paths, verify_signature

    for signed, signature in zip((certificate, checkpoint), signature_paths(certificate), strict=True):
        verify_signature(signed, signature, key)
        console().print(f"signature of {quoted(signed)}: valid", soft_wrap=True, highlight=False)


@contextmanager
def progress_bar(checks: Iterable[str]) -> Iterator[Callable[[str], None]]:
    """A progress bar over the checks. Yields a function to call with the name of each check before it starts."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress(*columns) as bar:
        task = bar.add_task("", total=len(list(checks)))
        started = 0

        def begin(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, completed=started)
            started += 1

        yield begin


def finish(report: Report, write: Callable[[Reportable], None]) -> int:
    """Print the report, write the files that were requested, and return the exit code."""
    report.show(console())
    write(report)
    return 0 if report.passed else 1
