"""Download checkpoints from the Hugging Face hub, and upload directories to it. Needs the `hub` extra."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bridge.errors import BridgeError, CheckpointError, bullet_list, install_command, quoted
from bridge.formats.directory import CARRIED_FILES, CONFIG
from bridge.formats.recognition import choose_checkpoint
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE_FOLDER

_COMPANIONS = (CONFIG, "adapter_config.json", *CARRIED_FILES, f"{CHAT_TEMPLATE_FOLDER}/*.jinja")
_WEIGHTS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
    ("flax_model*.msgpack", "flax_model.msgpack.index.json"),
)
"""File patterns of each form of the weights, in order of preference. Each form is the whole model."""
_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_repo_id(text: str) -> bool:
    """Whether the text is a valid repository id, such as `gpt2` or `openai-community/gpt2`."""
    return _REPO_ID.fullmatch(text) is not None


def download(repo_id: str) -> Path:
    """Download a model, or find it in the local cache, and return its directory.

    Only one form of the weights is downloaded.

    Raises:
        CheckpointError: the `hub` extra is not installed, or the download failed.
    """
    missing = f"{quoted(repo_id)} is not a local path"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}; to load it from the Hugging Face hub, install its extra: {install_command('hub')}"
        ) from None
    try:
        for weights in _WEIGHTS:
            path = Path(snapshot_download(repo_id, allow_patterns=[*_COMPANIONS, *weights]))
            if choose_checkpoint(path) is not None:
                break
        return path
    except Exception as error:  # the hub's client also raises errors of its HTTP library and of the system
        raise CheckpointError(
            f"{missing}, and the download from the Hugging Face hub failed ({type(error).__name__}); check the name "
            "and the connection, or download the model on another machine and give its directory"
        ) from error


CARD = "README.md"
CERTIFICATE = "parity.certificate"
"""The names of the model card and of the certificate that `gpt2 push` uploads beside a model."""
_GIT_ATTRIBUTES = ".gitattributes"
"""The file that the hub itself writes into a new repository."""
_REFUSALS = {
    401: "the hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token has no permission for this; use a token with write access to the owner's repositories",
    404: "there is no such repository or owner; check the name",
    409: "it exists and the token cannot read it, or another program is changing it; check the token, and try again",
    412: "it was changed by another program during the upload, and nothing was uploaded; try again",
}
"""HTTP status -> its meaning for an upload."""


class HubError(BridgeError):
    """The hub refused an upload, or it would replace files that may not be replaced."""


def has_token() -> bool:
    """Whether a token for the hub is set (HF_TOKEN) or stored by `hf auth login`."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return False
    return get_token() is not None


def upload(
    directory: Path,
    repo_id: str,
    *,
    message: str,
    private: bool = False,
    overwrite: bool = False,
    is_own_card: Callable[[str], bool] = lambda text: False,
    replace_card: bool = False,
) -> str:
    """Upload a directory as one commit and return its address. A new repository is created.

    A file of an earlier model that the upload does not replace, such as tokenizer.json, would be read with the new
    weights. Such a file is an error. With `overwrite`, it is deleted if this project wrote the repository's README.md.

    Args:
        directory: the files. Its folders are uploaded too.
        repo_id: owner and name, such as `me/my-gpt2`.
        message: the first line of the commit.
        private: create a private repository. An existing one must be private.
        overwrite: replace files of the same names, except a README.md that this project did not write.
        is_own_card: whether this project wrote a README.md with this text.
        replace_card: with `overwrite`, also replace a README.md that this project did not write.

    Raises:
        HubError: the hub refuses, or a file may not be replaced or deleted. An existing repository is unchanged. A new
            one may have been created, and is then empty. No message contains the token.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError:
        raise HubError(f"to upload to the Hugging Face hub, install its extra: {install_command('hub')}") from None
    api = HfApi()
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    head = _asked(repo_id, lambda: _existing(api, repo_id))
    stale: list[str] = []
    if head is None:
        _asked(repo_id, lambda: api.create_repo(repo_id, private=private))
    else:
        stale = _require_replaceable(head, repo_id, files, private=private, overwrite=overwrite)
        card = _asked(repo_id, lambda: _card(api, repo_id, head))
        is_own = card is not None and is_own_card(card)
        if stale and not is_own:
            raise _remaining(repo_id, stale, f"the repository has no {CARD} of gpt2 push; remove them on the hub first")
        if CARD in files and not (card is None or is_own or replace_card):
            raise HubError(
                f"{quoted(repo_id)} has a {CARD} that gpt2 push did not write, and nothing was uploaded; rename it on "
                "the hub, or replace it with --replace-card"
            )
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    commit = _asked(
        repo_id,
        lambda: api.create_commit(
            repo_id, operations, commit_message=message, parent_commit=None if head is None else head.sha
        ),
        "" if head is not None else "; the repository was created for this upload and may be empty",
    )
    return str(commit.commit_url)


def _asked(repo_id: str, request: Callable[[], Any], left_behind: str = "") -> Any:
    """Return the result of a request to the hub. If it fails, raise `HubError` with the reason and what it left behind.

    The error has no cause, because the errors of the client's libraries may refer to the request and its token.
    """
    try:
        return request()
    except HubError:
        raise
    except Exception as error:  # the hub's client also raises errors of its HTTP library and of the system
        status = _status(error)
        kind = f"{type(error).__name__}, HTTP {status}" if status else type(error).__name__
        why = _REFUSALS.get(status or 0, f"the request failed ({kind}); check the connection, and try again")
        raise HubError(f"{quoted(repo_id)}: {why}{left_behind}") from None


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or of its cause, if it has one."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _existing(api: Any, repo_id: str) -> Any:
    """Return the hub's description of a repository, or None if it does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _card(api: Any, repo_id: str, head: Any) -> str | None:
    """Return the text of a repository's README.md, or None if it has none."""
    if not any(sibling.rfilename == CARD for sibling in head.siblings):
        return None
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, CARD, revision=head.sha, cache_dir=folder)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def _require_replaceable(head: Any, repo_id: str, files: Iterable[str], *, private: bool, overwrite: bool) -> list[str]:
    """Return the files of an earlier model that these files do not replace.

    Raises `HubError` if these files may not be uploaded to the existing repository.
    """
    where, new = quoted(repo_id), {*files}
    if private and not head.private:
        raise HubError(f"{where} exists and is public; make it private on the hub, or omit --private")
    existing = {sibling.rfilename for sibling in head.siblings} - {_GIT_ATTRIBUTES}
    stale = _matching(existing - new, (*_COMPANIONS, CERTIFICATE))
    if not overwrite and (replaced := sorted(existing & new)):
        raise HubError(
            f"{where} has files that would be replaced; choose another repository, or replace them with --overwrite:\n"
            f"{bullet_list(map(quoted, replaced))}"
        )
    if stale and not overwrite:
        raise _remaining(repo_id, stale, "remove them on the hub first, or with --overwrite if gpt2 push wrote them")
    if others := _matching(existing - new, [pattern for form in _WEIGHTS for pattern in form]):
        raise HubError(
            f"{where} has other weights, which would remain beside the new ones; remove them on the hub first:\n"
            f"{bullet_list(map(quoted, others))}"
        )
    return stale


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = [*patterns]
    return [name for name in sorted(names) if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _remaining(repo_id: str, stale: Iterable[str], what_to_do: str) -> HubError:
    return HubError(
        f"{quoted(repo_id)} has files of another model, which would remain beside the new weights, and nothing was "
        f"uploaded; {what_to_do}:\n{bullet_list(map(quoted, stale))}"
    )
