"""The software and the device that a report was made with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from bridge import __version__

PACKAGES = ("numpy", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
"""The packages whose versions matter for the figures of a report."""


def environment() -> dict[str, str]:
    """Return the versions of Python and of the imported packages, the platform and JAX's default device.

    Nothing is imported, so that a report on files alone starts no framework.
    """
    found = {"gpt2-bridge": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        if name in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # a source tree on the path
                found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    found["platform"] = platform.platform()
    if (jax := sys.modules.get("jax")) is not None:
        device = jax.devices()[0]
        found["device"] = f"{device.platform}, {device.device_kind}"
    return found
