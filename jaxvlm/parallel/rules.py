"""From the models' logical axis names to mesh axes: the one table that says how everything is sharded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxvlm.config import ConfigError
from jaxvlm.parallel.mesh import AXES


@dataclass(frozen=True)
class Rules:
    """The mesh axes over which each logical axis is split, the slower one first.

    Parameters are split over `fsdp` along their width and over `tensor` along heads, MLP columns or vocabulary; activations
    over (`data`, `fsdp`) along the batch and over `context` along the length. One name, one meaning, in both towers. Two
    names are split as far as it goes: `tiles` only over `data` and `fsdp` where `context` does not divide them, and
    `kv_heads` not at all where `tensor` is a multiple of them, so that several devices read the same key head.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    tiles: tuple[str, ...] = ("data", "fsdp", "context")  # rows x tiles, one image each: no tile sees another
    length: tuple[str, ...] = ("context",)
    visual_length: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    vision_embed: tuple[str, ...] = ("fsdp",)
    vision_heads: tuple[str, ...] = ("tensor",)
    vision_mlp: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()

    def __post_init__(self):
        for name, targets in dataclasses.asdict(self).items():
            unknown = [target for target in targets if target not in AXES]
            if unknown or len(set(targets)) < len(targets):
                raise ConfigError(
                    f"Rules.{name} = {targets} must be different ones of the mesh axes {', '.join(AXES)}."
                )


RULES = Rules()
# Answering splits no row: a step of decoding has one token.
INFERENCE = Rules(length=(), tiles=("data", "fsdp"))
# Fields of a batch whose second dimension is the row's length.
LENGTH_FIELDS = {"tokens", "visual_index", "positions", "segment_ids", "targets", "loss_weights", "source_ids"}
LENGTH_FIELDS |= {"visual_corners", "visual_shares"}


def logical_rules(rules: Rules = RULES) -> list[tuple[str, tuple[str, ...]]]:
    """The table in the form `flax.linen.logical_axis_rules` takes."""
    return list(dataclasses.asdict(rules).items())


def partition_spec(
    axes: tuple[str | None, ...],
    mesh: Mesh | AbstractMesh,
    shape: tuple[int, ...],
    name: str = "",
    rules: dict[str, tuple[str, ...]] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the logical names `axes`, by `rules` (`RULES`).

    Raises `ConfigError` for a name that the table does not know, when two dimensions land on one mesh axis, or when a
    dimension does not divide; it names both.
    """
    rules = dict(logical_rules()) if rules is None else rules
    spec: list[str | tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ConfigError(f"'{name}' has an axis '{axis}' that the sharding table does not know.")
        targets = tuple(target for target in rules[axis] if mesh.shape[target] > 1) if axis else ()
        for target in targets:
            if target in used:
                raise ConfigError(f"'{name}': axes '{used[target]}' and '{axis}' both map to the mesh axis '{target}'.")
            used[target] = axis
        ways = math.prod(mesh.shape[target] for target in targets)
        if size % ways and axis == "tiles":
            targets = tuple(target for target in targets if target != "context")
            ways = math.prod(mesh.shape[target] for target in targets)
        elif size % ways and axis == "kv_heads" and ways % size == 0:
            targets, ways = (), 1
        if size % ways:
            raise ConfigError(
                f"'{name}': axis '{axis}' of size {size} does not divide over the mesh axis {'x'.join(targets)} "
                f"of size {ways}. Choose a mesh whose '{targets[-1]}' divides it: at most {math.gcd(size, ways)} here."
            )
        spec.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*spec)


def active() -> tuple[AbstractMesh, dict[str, tuple[str, ...]]] | None:
    """The mesh of `jax.set_mesh` and the rules of `flax.linen.logical_axis_rules`, or None where there are not both."""
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    return None if mesh.empty or not rules else (mesh, dict(rules))


def active_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> PartitionSpec | None:
    """`partition_spec` on the active mesh by the active rules; None where there are not both."""
    found = active()
    return found and partition_spec(axes, found[0], shape, name, found[1])


def constrain(x: jax.Array, axes: tuple[str | None, ...], name: str = "an activation") -> jax.Array:
    """`x`, to be split along its dimensions as the active rules say of the logical names `axes`.

    Does nothing outside of `jax.set_mesh` and `flax.linen.logical_axis_rules`. Unlike flax's own function it raises, as
    `partition_spec` does, where the rules do not fit.
    """
    if (found := active()) is None:
        return x
    mesh, rules = found
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, x.shape, name, rules))


def param_shardings(logical: dict, abstract: dict, mesh: Mesh) -> dict:
    """A tree of NamedShardings for a parameter tree, from its logical axes (`models.vlm.logical_axes`)."""

    def sharding(path, leaf, axes):
        name = "/".join(key.key for key in path)
        return NamedSharding(mesh, partition_spec(axes, mesh, leaf.shape, name))

    return jax.tree_util.tree_map_with_path(sharding, abstract, logical, is_leaf=lambda x: isinstance(x, tuple))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data-parallel axes; every other dimension whole.

    Where the length is split over `context`, the model splits it: a slice that each device takes of what it has.
    """
    return NamedSharding(mesh, PartitionSpec(RULES.batch))


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Host arrays (this process's rows) to global device arrays.

    Raises `ConfigError` where the rows' length does not divide over `context`.
    """
    for name in LENGTH_FIELDS & batch.keys():
        length, ways = batch[name].shape[1], mesh.shape["context"]
        if length % ways:
            raise ConfigError(
                f"Rows of {length} tokens do not divide over the mesh axis context of size {ways}. Make "
                f"config.prompt.length (and a stage's data.length) a multiple of {ways}, or change config.mesh."
            )
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
