"""The optimiser of a stage, assembled from optax by config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.config import ConfigError, OptimizerConfig
from jaxvlm.train.state import flat

OFFLOAD_KIND = "pinned_host"  # jax's name of the host memory that a device reads by itself
# Neither is decayed, as in the Hugging Face trainer; scale1 and scale2 are DINOv2's residual scales.
NOT_DECAYED = re.compile(r"(^|/)(bias|scale|scale1|scale2)$")
# Why a name one may expect is not there.
MISSING = {
    "adamw_8bit": "optax has no 8-bit moments; 'adafactor' with moment_dtype = 'bfloat16' needs about as little memory",
    "adam": "'adamw' with weight_decay = 0 is the same",
}


def schedule(config: OptimizerConfig, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at optimiser step t = 0, 1, ...: linear warm-up from 0, then cosine, linear or constant.

    The reference trainers' own formulas (recipes §1.3 D2, §8): warm-up ends after ceil (LLaVA) or floor (Prismatic) of
    `warmup_ratio * num_steps`, the first step of a warmed-up run has rate 0, and the end of the run has rate 0.
    """
    rounding = {"ceil": math.ceil, "floor": math.floor}.get(config.warmup_rounding)
    if rounding is None:
        raise ConfigError(f"optimizer.warmup_rounding must be 'ceil' or 'floor', not '{config.warmup_rounding}'.")
    decays = {
        "cosine": lambda x: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
        "linear": lambda x: 1.0 - x,
        "constant": lambda x: jnp.ones_like(x),
    }
    if config.schedule not in decays:
        raise ConfigError(f"optimizer.schedule must be one of {', '.join(decays)}, not '{config.schedule}'.")
    warmup = rounding(config.warmup_ratio * num_steps)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, num_steps - warmup), 0.0, 1.0)
        factor = jnp.where(step < warmup, step / max(1, warmup), decays[config.schedule](progress))
        return config.learning_rate * factor

    return rate


def make_optimizer(config: OptimizerConfig, num_steps: int, trainable: dict) -> optax.GradientTransformation:
    """Clip (optional), direction, decoupled decay, rates, schedule, and an average of the result (optional).

    Decay and learning rate are those of a parameter's group: the config's value times the factor of the first pattern that
    matches its path. Biases and norm parameters are not decayed, as in the Hugging Face trainer. `trainable` may be arrays
    or shapes. Raises `ConfigError` for an unknown optimiser or a pattern that matches nothing.
    """
    direction = _direction(config)
    parts = [direction] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm), direction]
    if config.weight_decay:
        scales = _factors(config.weight_decay_scales, "weight_decay_scales", trainable)
        decays = _by_path(lambda path, scale: 0.0 if NOT_DECAYED.search(path) else scale * config.weight_decay, scales)
        parts.append(_each(lambda update, decay, param: update + decay * param, decays))
    if config.learning_rate_scales:
        scales = _factors(config.learning_rate_scales, "learning_rate_scales", trainable)
        parts.append(_each(lambda update, scale, _: scale * update, scales))
    rate = schedule(config, num_steps)
    parts.append(optax.scale_by_schedule(lambda step: -rate(step)))
    if config.ema_decay:
        parts.append(_average(config.ema_decay))
    optimizer = optax.chain(*parts)
    return _from_host(optimizer) if config.offload else optimizer


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What the optimiser makes of a gradient, before decay and learning rate. The first moment may be bfloat16.

    Adafactor (Shazeer & Stern 2018) is in the form of Zhai et al. 2021 (arXiv 2106.04560, appendix A): Adam's learning
    rates, a first moment, and the decay 1 - t^-0.8 of the factored second one at most betas[1]. A gradient of scanned
    layers is one array, so its updates are clipped to root mean square 1 over all layers together.
    """
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"optimizer.moment_dtype must be float32 or bfloat16, not '{config.moment_dtype}'.")
    (beta1, beta2), dtype = config.betas, jnp.dtype(config.moment_dtype)
    if config.name == "adamw":
        return optax.scale_by_adam(beta1, beta2, eps=config.eps, mu_dtype=dtype)
    if config.name == "lion":
        return optax.scale_by_lion(beta1, beta2, mu_dtype=dtype)
    if config.name == "sgd":
        return optax.trace(beta1, accumulator_dtype=dtype) if beta1 else optax.identity()
    if config.name == "adafactor":

        def decay(step, power):
            return jnp.minimum(beta2, 1.0 - (step + 1.0) ** -power)

        factored = [optax.scale_by_factored_rms(decay_rate_fn=decay), optax.clip_by_block_rms(1.0)]
        return optax.chain(*factored, *([optax.ema(beta1, debias=False, accumulator_dtype=dtype)] if beta1 else []))
    why = f" ({MISSING[config.name]})" if config.name in MISSING else ""
    raise ConfigError(f"optimizer.name '{config.name}' is not known{why}; available: adamw, adafactor, lion, sgd.")


# ------------------------------------------------------------------------------------------------------------- groups


def _by_path(value: Callable[..., Any], tree: dict) -> dict:
    """`value(path, leaf)` of every leaf, with the path as in `flat`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: value("/".join(key.key for key in path), leaf), tree)


def _factors(groups: tuple[tuple[str, float], ...], setting: str, trainable: dict) -> dict:
    """The factor of each leaf: that of the first pattern that matches its path, or 1."""
    for pattern, _ in groups:
        if not any(re.match(pattern, path) for path in flat(trainable)):
            raise ConfigError(f"Pattern '{pattern}' of optimizer.{setting} matches no trainable parameter.")

    def factor(path, _):
        return next((scale for pattern, scale in groups if re.match(pattern, path)), 1.0)

    return _by_path(factor, trainable)


def _each(change: Callable[..., Any], values: dict) -> optax.GradientTransformation:
    """`change(update, value, parameter)` for every leaf."""
    return optax.stateless(lambda updates, params: jax.tree.map(change, updates, values, params))


# ------------------------------------------------------------------------------------------------------------ average


class AverageState(NamedTuple):
    """The exponential moving average of the trainable parameters."""

    average: dict


def _average(decay: float) -> optax.GradientTransformation:
    """average = decay * average + (1 - decay) * parameters after each step, from the parameters before the first one.

    Last in a chain, where updates are what is added to the parameters. As part of the optimiser's state it is sharded,
    saved and restored like the moments.
    """

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        return updates, AverageState(jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.average, new))

    return optax.GradientTransformation(lambda params: AverageState(jax.tree.map(jnp.copy, params)), update)


def averaged(opt_state: Any) -> dict | None:
    """The average in an optimiser's state, or None where `ema_decay` is 0."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AverageState))
    return next((state.average for state in states if isinstance(state, AverageState)), None)


# ------------------------------------------------------------------------------------------------- where the state lies


def moment_spec(spec: PartitionSpec, shape: tuple[int, ...], moment: tuple[int, ...]) -> PartitionSpec:
    """The PartitionSpec of a moment of shape `moment` that belongs to a parameter of `shape` with `spec`.

    A moment of the parameter's shape is split as the parameter is; one without one of its dimensions (Adafactor's) as the
    others are. Where two dimensions of one size leave open which is missing, the last one is taken to be: another choice
    would cost a transfer of this one vector. Anything else (Adafactor's place-holders) is on every device.
    """
    axes = (*spec, *[None] * (len(shape) - len(spec)))
    if moment == shape:
        return PartitionSpec(*axes)
    for missing in reversed(range(len(shape))):
        if moment == shape[:missing] + shape[missing + 1 :]:
            return PartitionSpec(*axes[:missing], *axes[missing + 1 :])
    return PartitionSpec()


def opt_state_shardings(opt_state: Any, trainable: dict, shardings: dict, mesh: Mesh, offload: bool = False) -> Any:
    """Shardings of an optimiser's state: every moment as its parameter, by `moment_spec`; counters on every device.

    `trainable` and `opt_state` may be shapes. With `offload` the moments are in the host's memory.
    Raises `ConfigError` where the backend has no such memory.
    """
    device = mesh.devices.flat[0]
    if offload and OFFLOAD_KIND not in {memory.kind for memory in device.addressable_memories()}:
        raise ConfigError(
            f"optimizer.offload needs a backend with {OFFLOAD_KIND} memory, and {device.device_kind} has "
            "none. Set optimizer.offload=False; 'adafactor' or moment_dtype='bfloat16' save memory too."
        )
    structure, kind = jax.tree.structure(trainable), OFFLOAD_KIND if offload else None

    def like_parameters(node):
        return jax.tree.structure(node) == structure

    def of(node):
        if not like_parameters(node):
            return NamedSharding(mesh, PartitionSpec())

        def one(moment, param, sharding):
            return NamedSharding(mesh, moment_spec(sharding.spec, param.shape, moment.shape), memory_kind=kind)

        return jax.tree.map(one, node, trainable, shardings)

    return jax.tree.map(of, opt_state, is_leaf=like_parameters)


def _from_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, for a state whose moments lie in host memory: fetched for the update, and sent back as `jax.jit`'s
    `out_shardings` say. Counters have no dimension and stay on the device.
    """

    def update(updates, state, params):
        state = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, state)
        return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
