"""`gpt2 plan`: estimate the cost of a training step on other devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, arg

from bridge import BridgeError
from gpt2_jax.cli.arguments import JsonFile
from gpt2_jax.cli.config_flags import ConfigFlags, config_flags, values_of
from gpt2_jax.console.output import json_writer, status_bar
from gpt2_jax.console.report_files import require_plot_path
from gpt2_jax.console.terminal import console
from gpt2_jax.training.config import TrainConfig, from_flat

if TYPE_CHECKING:
    from gpt2_jax.plan.topology import Topology

DOES_NOT_FIT = 1


def plan_command(default: TrainConfig) -> Callable[..., int]:
    """Return the verb with the values of `default` as the defaults of its flags."""
    flags = config_flags(default)

    def plan(
        *,
        config: Annotated[ConfigFlags, OmitArgPrefixes, arg(name="")] = flags,
        topology: Annotated[str | None, arg(metavar="NAME")] = None,
        devices: int | None = None,
        scaling: bool = False,
        json: JsonFile = None,
        plot_file: Annotated[Path | None, arg(name="plot", metavar="FILE")] = None,
        overwrite: bool = False,
    ) -> int:
        """Compile the training step for other devices and report memory, communication and a lower bound on its time.

        Takes the flags of `gpt2 train`. Opens no data, so --vocab-size is used unchanged. Compiling takes a minute for
        any size. Exit code 1 if the step does not fit into memory; always 0 with --scaling, which lists every size.

        Example: gpt2 plan --preset gpt2-xl --topology v5e:4x4 --mesh fsdp=16 --num-microbatches 6

        Args:
            config: the configuration; --preset sets the default of every other flag.
            topology: a TPU chip and shape, such as v5e:4x4, v5p:2x2x1, v6e:8x8 or v4:2x2x4; v5e:4x4*2 is two slices.
                Compiled with libtpu (extra `tpu`), which needs no TPU.
            devices: instead of a topology, this many virtual CPU devices. Needs no libtpu and gives no time estimate.
            scaling: weak scaling: the same rows per chip, from 1 chip to 256, with --mesh data=-1 or fsdp=-1. Takes a
                minute for each of five sizes.
            json: also write the report to this file.
            plot_file: with --scaling, also draw the results to this file (.png, .svg or .pdf).
            overwrite: replace the report and the plot of an earlier command.
        """
        write_json = json_writer(json, overwrite)
        if plot_file is not None and not scaling:
            raise BridgeError("--plot draws weak scaling: give --scaling too")
        if plot_file is not None:
            require_plot_path(plot_file, overwrite=overwrite, json=json)
        train_config = from_flat(values_of(config))
        import jax  # not at the top, because `gpt2 plan --help` must not wait for it

        from gpt2_jax.plan.plan import make_plan, weak_scaling
        from gpt2_jax.plan.plot import plot
        from gpt2_jax.plan.report import show, show_scaling
        from gpt2_jax.plan.report_json import scaling_to_json, to_json

        jax.config.update("jax_platforms", "cpu")  # libtpu only compiles; JAX must not look for a TPU
        chosen = _topology(topology, devices)
        with status_bar() as say:
            points = weak_scaling(train_config, chosen, say) if scaling else []
            step_plan = None if scaling else make_plan(train_config, chosen, say)
        if step_plan is not None:
            write_json(to_json(step_plan))
            show(step_plan, console())
            return 0 if step_plan.fits else DOES_NOT_FIT
        write_json({"scaling": scaling_to_json(points)})
        show_scaling(points, console())
        if plot_file is not None:
            plot(points, plot_file, overwrite=overwrite)
        return 0

    return plan


def _topology(name: str | None, devices: int | None) -> Topology:
    from gpt2_jax.plan.errors import PlanError
    from gpt2_jax.plan.topology import cpu_topology, tpu_topology

    if (name is None) == (devices is None):
        raise PlanError("give either --topology, such as v5e:4x4, or --devices N for N virtual CPU devices")
    return tpu_topology(name) if name is not None else cpu_topology(devices or 0)
