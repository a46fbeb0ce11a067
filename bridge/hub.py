"""Download checkpoints from the Hugging Face hub. Needs the `hub` extra."""

from __future__ import annotations

import re
from pathlib import Path

from bridge.errors import CheckpointError, install_command, quoted
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
