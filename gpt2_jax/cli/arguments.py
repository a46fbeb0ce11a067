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
JsonFile = Annotated[Path | None, arg(metavar="FILE")]
