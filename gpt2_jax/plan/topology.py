"""Devices to compile for: TPU topologies from libtpu, or virtual CPU devices."""

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

# libtpu queries its host for the kind of TPU. These variables give the answer on a machine without one, and silence the
# log. Several processes may load libtpu at once, because none of them uses a device.
_LIBTPU_ENVIRONMENT = {
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
    """Devices that a program can be compiled for."""

    name: str
    devices: tuple[Any, ...]
    chip: TpuChip | None
    """None for CPU devices, whose rates are unknown."""
    slices: int = 1


def tpu_topology(name: str) -> Topology:
    """The topology with a name such as `v5e:4x4`, or `v5e:4x4*2` for two slices.

    Raises:
        PlanError: the name is invalid, libtpu is not installed, or libtpu does not know the topology.
    """
    found = _NAME.fullmatch(name)
    chip = TPU_CHIPS.get(found["chip"]) if found else None
    if found is None or chip is None:
        raise PlanError(
            f"--topology {name}: give a chip ({', '.join(TPU_CHIPS)}), its shape, and the number of slices if there "
            "are several, such as v5e:4x4, v5p:2x2x1 or v5e:4x4*2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--topology {name} needs libtpu, the TPU compiler, which runs on any Linux machine: "
            f"{install_command('tpu')}. Or use --devices N to compile for N virtual CPU devices"
        )
    slices = int(found["slices"] or 1)
    return Topology(name, tuple(_devices(chip, found["shape"], slices)), chip, slices)


def _devices(chip: TpuChip, shape: str, slices: int) -> list[Any]:
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(int(size) for size in shape.split("x")) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default is four chips per host
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip form one device, as on Cloud TPU
    for setting, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(setting, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{shape}", **options).devices
    except JaxRuntimeError as error:
        raise PlanError(f"--topology {chip.name}:{shape}: libtpu does not support it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")


def cpu_topology(count: int) -> Topology:
    """`count` virtual CPU devices. Raises `PlanError` if JAX was already initialised with fewer."""
    if not 1 <= count <= 4096:
        raise PlanError(f"--devices {count}: must be from 1 to 4096")
    with suppress(RuntimeError):  # JAX is already initialised
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise PlanError(f"--devices {count}: JAX is already initialised with {len(devices)} in this process")
    return Topology(f"{count} x CPU", tuple(devices[:count]), None)
