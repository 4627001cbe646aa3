"""The device mesh: axes ('data', 'fsdp', 'tensor', 'context'), data outermost (over DCN between slices)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxvlm.config import ConfigError, MeshConfig, StageConfig

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices (all of them by default, or those of a topology without hardware) along the four axes.

    At most one axis may be -1 and takes what is left. Axis types are Auto, said explicitly: jax's default is Explicit,
    under which mixing arrays of two meshes raises (ecosystem.md, version facts). Several slices lie along `data`, whose
    gradients cross the slower network once a step; within a slice the order follows the chips' wires.
    Raises `ConfigError` when the axes do not multiply to the number of devices, or `data` not to that of slices.
    """
    devices = list(devices or jax.devices())
    return Mesh(
        _arrange(devices, _sizes(config, len(devices)), config.slices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def require_rows_divide(stage: StageConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` unless every device of data x fsdp has as many whole rows of each micro-batch as the others."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if stage.batch_size % (data * fsdp * stage.accumulate):
        raise ConfigError(
            f"Stage '{stage.name}': batch_size = {stage.batch_size} rows in {stage.accumulate} micro-batches do not divide "
            f"over data x fsdp = {data} x {fsdp} devices. Make it a multiple of {data * fsdp * stage.accumulate}, or give "
            "part of the devices to config.mesh.tensor."
        )


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = {name: getattr(config, name) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh has two free axes, {' and '.join(free)}; leave at most one at -1.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if known < 1:
        raise ConfigError(f"config.mesh has an axis that is neither -1 nor a positive number: {sizes}.")
    if free:
        sizes[free[0]] = count // known
    if math.prod(sizes.values()) != count:
        axes = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(f"config.mesh needs {known} devices ({axes}) but this machine has {count}.")
    return tuple(sizes.values())


def _arrange(devices: list[Any], sizes: tuple[int, ...], slices: int) -> np.ndarray:
    """The devices as an array of this shape, slices outermost."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        # A GPU's is its host, whose network FSDP may cross; a topology of one slice, described without hardware, has none.
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        groups.setdefault(index, []).append(device)
    found = [groups[index] for index in sorted(groups)]
    if len(found) == 1 and slices > 1:  # devices that know of no slices: equal parts, in their order
        size, rest = divmod(len(devices), slices)
        if rest:
            raise ConfigError(f"config.mesh.slices = {slices} does not divide the {len(devices)} devices.")
        found = [devices[i * size : (i + 1) * size] for i in range(slices)]
    if slices not in (0, len(found)):
        raise ConfigError(f"config.mesh.slices = {slices}, but the devices say {len(found)}; 0 takes what they say.")
    data, *rest = sizes
    if data % len(found):
        raise ConfigError(
            f"config.mesh.data = {data} must be a multiple of the {len(found)} slices: only `data` may run over the "
            "network between them."
        )
    if len({len(group) for group in found}) > 1:
        raise ConfigError(f"Slices of different sizes, {[len(group) for group in found]} devices, make no mesh.")
    shape = (data // len(found), *rest)
    return np.concatenate([mesh_utils.create_device_mesh(shape, g, allow_split_physical_axes=True) for g in found])
