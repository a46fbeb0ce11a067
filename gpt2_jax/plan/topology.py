"""TPU topologies that are not here, from their compiler; or devices made of this machine's CPU."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from bridge.errors import install_command
from gpt2_jax.hardware import TPU_CHIPS, TpuChip
from gpt2_jax.plan.errors import PlanError

# libtpu asks its machine what it is: these are the answers of one that has no TPU, and quiet ones. Several processes
# may load it, for none of them has a device.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_NAME = re.compile(r"(?P<chip>[a-z0-9]+):(?P<shape>\d{1,3}(x\d{1,3}){1,2})(\*(?P<slices>[1-9]\d{0,2}))?")


@dataclass(frozen=True)
class Topology:
    """Devices that a program can be compiled for. Without a chip they are this machine's CPU, of which no rate is
    known."""

    name: str
    devices: tuple[Any, ...]
    chip: TpuChip | None
    slices: int = 1


def tpu_topology(name: str) -> Topology:
    """As `v5e:4x4` or, of two slices, `v5e:4x4*2` names it; raises `PlanError` for what is no such name, and where
    libtpu is not installed."""
    found = _NAME.fullmatch(name)
    chip = TPU_CHIPS.get(found["chip"]) if found else None
    if found is None or chip is None:
        raise PlanError(
            f"--topology {name}: write a chip ({', '.join(TPU_CHIPS)}), its shape, and the slices where there are "
            "several, as v5e:4x4, v5p:2x2x1 or v5e:4x4*2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--topology {name} needs the TPU's compiler, which runs on any Linux machine: "
            f"{install_command('tpu')}; or use --devices N to compile for N virtual CPU devices"
        )
    slices = int(found["slices"] or 1)
    return Topology(name, tuple(_devices(chip, found["shape"], slices)), chip, slices)


def _devices(chip: TpuChip, shape: str, slices: int) -> list[Any]:
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(int(size) for size in shape.split("x")) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host's four, unless it is said
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as on Cloud TPU
    for setting, value in _SETTINGS.items():
        os.environ.setdefault(setting, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{shape}", **options).devices
    except JaxRuntimeError as error:
        raise PlanError(f"--topology {chip.name}:{shape}: libtpu has none such: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")


def cpu_topology(count: int) -> Topology:
    """So many devices of this machine's CPU; raises `PlanError` where JAX has begun with fewer."""
    if not 1 <= count <= 4096:
        raise PlanError(f"--devices {count}: must be from 1 to 4096")
    with suppress(RuntimeError):  # it has made its devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise PlanError(f"--devices {count}: JAX has begun with {len(devices)} in this process")
    return Topology(f"{count} x CPU", tuple(devices[:count]), None)
