"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

BUNDLED = "bundled"
"""What is opened where no source is given: the small model that comes with the package."""

Source = Annotated[Positional[str], arg(metavar="SRC")]
JsonFile = Annotated[Path | None, arg(metavar="FILE")]
