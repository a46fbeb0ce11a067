"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import bridge

BUNDLED = str(bridge.BUNDLED)
"""What is opened where no source is given: the small model that comes with the package. By its path, because
`bundled` may be a directory of the user's too."""

Source = Annotated[Positional[str], arg(metavar="SRC")]
SourceOrBundled = Annotated[Positional[str], arg(metavar="SRC", help_behavior_hint="(default: bundled)")]
SourceActivation = Annotated[
    str | None,
    arg(
        metavar="gelu|gelu_new",
        help="the activation of a nanoGPT file, which does not state it; gelu_new for nanoGPT's code before June 14, "
        "2023. An error for every other source. (default: gelu)",
        help_behavior_hint="",
    ),
]
JsonFile = Annotated[Path | None, arg(metavar="FILE")]
