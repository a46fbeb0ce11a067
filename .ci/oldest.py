"""Print the lowest version that pyproject.toml allows of each direct dependency, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
    if lowest := re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement):
        print("{}=={}".format(*lowest.groups()))
