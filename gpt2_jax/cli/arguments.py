"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import bridge

BUNDLED = str(bridge.BUNDLED)
"""The default source: the small model that comes with the package. Its path is used, because the user may have a
directory named `bundled`."""

Source = Annotated[Positional[str], arg(metavar="SRC")]
SourceOrBundled = Annotated[Positional[str], arg(metavar="SRC", help_behavior_hint="(default: bundled)")]
SourceActivation = Annotated[
    str | None,
    arg(
        metavar="gelu|gelu_new",
        help="the activation of a nanoGPT file that does not state it; gelu_new for nanoGPT's code before June 14, "
        "2023. An error for every other source. (default: none; such a file is read as gelu)",
        help_behavior_hint="",
    ),
]
JsonFile = Annotated[Path | None, arg(metavar="FILE")]
