"""Print the lowest version that pyproject.toml allows of each direct dependency, as constraints for pip.

Without torch, whose older releases for Linux exist only as CUDA builds of several gigabytes.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for requirement in [*project["dependencies"], *(line for extra in extras for line in extra)]:
    lowest = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
    if lowest and lowest[1] != "torch":
        print(f"{lowest[1]}=={lowest[2]}")
