"""The device mesh: axes ('data', 'fsdp', 'tensor', 'context'), data outermost (over DCN between slices)."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh

from jaxvlm.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges the devices (all of them by default) along the four axes.

    At most one axis may be -1 and takes what is left. Axis types are Auto, said explicitly: jax's default is Explicit,
    under which mixing arrays of two meshes raises (ecosystem.md, version facts).
    Raises `ConfigError` when the axes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    sizes = {name: getattr(config, name) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh has two free axes, {' and '.join(free)}; leave at most one at -1.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        axes = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(f"config.mesh needs {known} devices ({axes}) but this machine has {len(devices)}.")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
