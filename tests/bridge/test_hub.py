"""Uploads to a stand-in for the hub: what is sent, what is never replaced, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import TOKEN, Hub, Repository, running_hub

from bridge import hub
from bridge.hub import HubError, has_token, upload

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own

REPO = "me/mine"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 9,
    "README.md": b"---\nlicense: mit\n---\nmine",
    "a/b": b"b",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def is_mine(text: str) -> bool:
    return text.endswith("mine")


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(HubError) as refused:
        upload(folder, REPO, message="m", is_own_card=is_mine, **options)  # type: ignore[arg-type]
    assert TOKEN not in str(refused.value)
    assert refused.value.__cause__ is None
    return str(refused.value)


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_gets_all_files_in_one_commit(server: Hub, folder: Path, private: bool) -> None:
    url = upload(folder, REPO, message="the first", private=private)
    made = server.repositories[REPO]
    assert {name: content for name, content in made.files.items() if name != ".gitattributes"} == FILES
    assert (made.private, made.commits) == (private, ["the first"])
    assert url == f"{server.url}/{REPO}/commit/{made.sha}"


def test_an_empty_repository_is_filled(server: Hub, folder: Path) -> None:
    server.repositories[REPO] = Repository(private=True)
    upload(folder, REPO, message="m", private=True)
    assert server.repositories[REPO].files["config.json"] == b"{}"
    assert "POST /api/repos/create" not in server.requests


def test_files_are_replaced_only_on_request(server: Hub, folder: Path) -> None:
    upload(folder, REPO, message="m")
    (folder / "config.json").write_bytes(b"{1}")
    message = refusal(folder)
    assert "would be replaced" in message and "--overwrite" in message and "'config.json'" in message
    assert server.repositories[REPO].commits == ["m"]
    upload(folder, REPO, message="again", overwrite=True, is_own_card=is_mine)
    assert server.repositories[REPO].files["config.json"] == b"{1}"
    assert server.repositories[REPO].commits == ["m", "again"]


def test_a_card_of_its_owner_is_not_replaced(server: Hub, folder: Path) -> None:
    server.repositories[REPO] = Repository(False, {".gitattributes": b"", "README.md": b"hours of work"})
    message = refusal(folder, overwrite=True)
    assert "has a README.md that gpt2 push did not write" in message and "--replace-card" in message
    assert server.repositories[REPO].files == {".gitattributes": b"", "README.md": b"hours of work"}
    upload(folder, REPO, message="m", overwrite=True, replace_card=True)
    assert server.repositories[REPO].files["README.md"] == FILES["README.md"]


def test_other_weights_do_not_remain_beside_the_new_ones(server: Hub, folder: Path) -> None:
    server.repositories[REPO] = Repository(False, {"pytorch_model.bin": b"old", "notes.txt": b"kept"})
    message = refusal(folder, overwrite=True)
    assert "other weights" in message and "'pytorch_model.bin'" in message and "notes.txt" not in message
    del server.repositories[REPO].files["pytorch_model.bin"]
    upload(folder, REPO, message="m")
    assert server.repositories[REPO].files["notes.txt"] == b"kept"


STALE = {"tokenizer.json": b"t", "additional_chat_templates/a.jinja": b"c", "parity.certificate": b"p"}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("card", [{}, {"README.md": b"hours of work"}, {"README.md": b"mine"}])
def test_files_of_another_model_do_not_remain_beside_the_new_weights(
    server: Hub, folder: Path, card: dict[str, bytes], overwrite: bool
) -> None:
    """They are deleted only with `overwrite`, and only if `gpt2 push` wrote the repository's card."""
    before = {".gitattributes": b"", "notes.txt": b"kept", **STALE, **card}
    server.repositories[REPO] = Repository(False, dict(before))
    if not overwrite:
        (folder / "README.md").unlink()  # no file would be replaced
    if overwrite and card == {"README.md": b"mine"}:
        upload(folder, REPO, message="m", overwrite=True, is_own_card=is_mine)
        assert server.repositories[REPO].files == {".gitattributes": b"", "notes.txt": b"kept", **FILES}
        assert server.repositories[REPO].commits == ["m"]
        return
    message = refusal(folder, overwrite=overwrite, replace_card=True)
    assert "files of another model" in message and ("--overwrite" in message) is not overwrite
    assert all(repr(name) in message for name in STALE) and "notes.txt" not in message
    assert server.repositories[REPO] == Repository(False, before)


def test_private_weights_are_not_sent_to_a_public_repository(server: Hub, folder: Path) -> None:
    server.repositories[REPO] = Repository(private=False)
    assert "is public" in refusal(folder, private=True)
    assert server.repositories[REPO].commits == []


REFUSALS = {
    ("/api/repos/create", 401): "does not accept the token",
    ("/api/repos/create", 403): "write access",
    ("/api/repos/create", 409): "it exists and the token cannot read it",
    ("/commit/", 403): "write access",
    ("/commit/", 409): "another program is changing it",
    ("/commit/", 412): "changed by another program",
    ("/lfs/", 400): "HTTP 400",
}


@pytest.mark.parametrize(("path", "status"), REFUSALS)
def test_refusals_have_a_meaning(server: Hub, folder: Path, path: str, status: int) -> None:
    server.refusals[path] = status
    message = refusal(folder)
    assert REFUSALS[path, status] in message
    assert ("created for this upload and may be empty" in message) is (REPO in server.repositories)
    assert not any(repository.commits for repository in server.repositories.values())


def test_a_wrong_token_is_not_shown(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotherSecret")
    message = refusal(folder)
    assert "does not accept the token" in message and "Secret" not in message


def test_a_change_during_the_upload_is_detected(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories[REPO] = Repository(private=False)
    check = hub._require_replaceable

    def changed_meanwhile(*arguments: object, **options: object) -> list[str]:
        stale = check(*arguments, **options)  # type: ignore[arg-type]
        server.repositories[REPO].commits.append("another program's")
        return stale

    monkeypatch.setattr(hub, "_require_replaceable", changed_meanwhile)
    assert "changed by another program" in refusal(folder)
    assert server.repositories[REPO].commits == ["another program's"]


def test_the_token_is_found_in_the_environment(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_token()
    monkeypatch.delenv("HF_TOKEN")
    assert not has_token()
