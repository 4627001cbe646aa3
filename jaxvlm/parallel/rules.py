"""From the models' logical axis names to mesh axes: the one table that says how everything is sharded."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.config import ConfigError

# Parameters are split over `fsdp` along their width and over `tensor` along heads, MLP columns or vocabulary;
# activations over ('data', 'fsdp') along the batch. One name, one meaning, in both towers.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "visual_length": None,
    "activation_embed": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "layers": None,
    "lora": None,
}


def logical_rules() -> list[tuple[str, str | tuple[str, ...] | None]]:
    """The table in the form `flax.linen.logical_axis_rules` takes."""
    return list(RULES.items())


def partition_spec(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...], name: str = "") -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the logical names `axes`.

    Raises `ConfigError` when two dimensions land on one mesh axis, or a dimension does not divide; it names both.
    """
    spec: list[str | tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ConfigError(f"Parameter '{name}' has an axis '{axis}' that the sharding table does not know.")
        target = RULES[axis] if axis is not None else None
        targets = (target,) if isinstance(target, str) else tuple(target or ())
        targets = tuple(t for t in targets if mesh.shape[t] > 1)
        for t in targets:
            if t in used:
                raise ConfigError(f"'{name}': axes '{used[t]}' and '{axis}' both map to the mesh axis '{t}'.")
            used[t] = axis
        ways = 1
        for t in targets:
            ways *= mesh.shape[t]
        if size % ways:
            raise ConfigError(
                f"'{name}': axis '{axis}' of size {size} does not divide over the mesh axis {'x'.join(targets)} "
                f"of size {ways}. Choose a mesh whose '{targets[0]}' divides {size}."
            )
        spec.append(None if not targets else targets[0] if len(targets) == 1 else targets)
    return PartitionSpec(*spec)


def param_shardings(logical: dict, abstract: dict, mesh: Mesh) -> dict:
    """A tree of NamedShardings for a parameter tree, from its logical axes (`models.vlm.logical_axes`)."""

    def sharding(path, leaf, axes):
        name = "/".join(key.key for key in path)
        return NamedSharding(mesh, partition_spec(axes, mesh, leaf.shape, name))

    return jax.tree_util.tree_map_with_path(sharding, abstract, logical, is_leaf=lambda x: isinstance(x, tuple))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data-parallel axes; every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Host arrays (this process's rows) to global device arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
