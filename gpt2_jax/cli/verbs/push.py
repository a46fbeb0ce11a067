"""`gpt2 push`: share a checkpoint on the Hugging Face hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

import bridge
from bridge import hub
from bridge.errors import escaped, quoted
from gpt2_jax.cli.arguments import READING, JsonFile, Reading, Source
from gpt2_jax.cli.effect import Rule, defaults_of, require_effect
from gpt2_jax.console.output import json_writer, reading_bar
from gpt2_jax.console.terminal import console

RULES = (Rule(("replace_card",), lambda values: not values["overwrite"], "without --overwrite"),)


def push(
    source: Source,
    repo: Annotated[Positional[str], arg(metavar="REPO")],
    /,
    *,
    license: Annotated[str, arg(metavar="ID")],
    reading: Reading = READING,
    evaluation: Annotated[Path | None, arg(metavar="FILE")] = None,
    certificate: Annotated[Path | None, arg(metavar="FILE")] = None,
    private: bool = False,
    overwrite: bool = False,
    replace_card: bool = False,
    dry_run: FlagCreatePairsOff[bool] = False,
    no_dry_run: FlagCreatePairsOff[bool] = False,
    json: JsonFile = None,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, with a generated model card.

    The checkpoint is written in Hugging Face format. The card states the license, the model, and what is known about
    its training: the recipe, the losses, and the fingerprint of the data. Without a token for the hub, nothing is sent:
    the files and the card are printed, as with --dry-run. Read the card before you upload.

    Example: gpt2 push runs/mine me/my-gpt2 --license mit --dry-run

    Args:
        source: a checkpoint in any format, a run, or a Hugging Face id.
        reading: how SRC is read.
        repo: the repository, OWNER/NAME. It is created if it does not exist.
        license: the license of the weights, an identifier of the hub's list such as mit, apache-2.0 or other.
        evaluation: a report of gpt2 eval --json for this checkpoint. Its figures are added to the card.
        certificate: a certificate of gpt2 verify --certificate for the exported weights. It is uploaded too, with the
            token ids of its text.
        private: create a private repository. An existing repository must be private.
        overwrite: replace files of the same names in the repository, delete files of the model that gpt2 push wrote
            there before, and replace the report of an earlier command.
        replace_card: with --overwrite: also replace a README.md that gpt2 push did not write.
        dry_run: print the files and the card, and send nothing.
        no_dry_run: upload, and fail without a token.
        json: also write a report to this file.
    """
    require_effect(locals(), defaults_of(push), RULES)
    sends = _sends(dry_run, no_dry_run)
    write_json = json_writer(json, overwrite, (source, reading.base, evaluation, certificate))
    from gpt2_jax.sharing import is_own_card, prepare, require_license, require_repo_id

    require_repo_id(repo)
    require_license(license)
    out = console()
    with TemporaryDirectory() as folder:
        with reading_bar(reading.load(source), "writing") as checkpoint:
            export = prepare(
                checkpoint,
                repo,
                Path(folder) / "export",
                license=license,
                evaluation=evaluation,
                certificate=certificate,
            )
        url = None
        if sends:
            url = hub.upload(
                export.directory,
                repo,
                message=f"Upload with gpt2 push of gpt2-bridge {bridge.__version__}",
                private=private,
                overwrite=overwrite,
                is_own_card=is_own_card,
                replace_card=replace_card,
            )
        sizes = export.sizes()
    for name, size in sizes.items():
        out.print(f"{name}: {size:,} bytes", soft_wrap=True)
    for what in export.left_out:
        out.print(f"left out: {what}", soft_wrap=True)
    if url is None:
        out.print(f"\n{escaped(export.card)}", soft_wrap=True)
        out.print(f"dry run: nothing was sent to {quoted(repo)}{'' if dry_run else '; there is no token for the hub'}")
    else:
        out.print(f"uploaded: {escaped(url)}", soft_wrap=True)
    write_json({"source": source, "repo": repo, "files": sizes, "card": export.card, "url": url})


def _sends(dry_run: bool, no_dry_run: bool) -> bool:
    """Whether the command uploads. Raises `BridgeError` if --no-dry-run is given and there is no token."""
    if dry_run and no_dry_run:
        raise bridge.BridgeError("--dry-run and --no-dry-run are mutually exclusive; give one")
    has_token = not dry_run and hub.has_token()
    if no_dry_run and not has_token:
        raise bridge.BridgeError(
            "--no-dry-run: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    return has_token
