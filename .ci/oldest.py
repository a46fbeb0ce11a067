"""Print the lowest version that pyproject.toml allows of each direct dependency, as constraints for pip.

Without torch, whose older releases for Linux exist only as CUDA builds of several gigabytes.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
lowest: dict[str, str] = {}
for requirement in [*project["dependencies"], *(line for extra in extras for line in extra)]:
    bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
    if bound and bound[1] != "torch":
        lowest[bound[1]] = bound[2]  # that of an extra, if the extra needs a newer release
for name, version in lowest.items():
    print(f"{name}=={version}")
