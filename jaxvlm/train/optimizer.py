"""The optimiser of a stage, assembled from optax by config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxvlm.config import ConfigError, OptimizerConfig
from jaxvlm.train.state import flat


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
    """AdamW over the trainable tree: clip (optional), Adam, decoupled decay, per-group rates, schedule.

    Biases and norm parameters are not decayed, as in the Hugging Face trainer.
    Raises `ConfigError` for an unknown optimiser or a learning-rate pattern that matches nothing.
    """
    if config.name != "adamw":
        raise ConfigError(f"optimizer.name '{config.name}' is not known; available: adamw.")
    beta1, beta2 = config.betas
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(beta1, beta2, eps=config.eps))
    if config.weight_decay:
        decays = _by_path(trainable, lambda path: not re.search(r"(bias|scale|scale1|scale2)$", path))
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    if config.learning_rate_scales:
        for pattern, _ in config.learning_rate_scales:
            if not any(re.match(pattern, path) for path in flat(trainable)):
                raise ConfigError(f"Learning-rate pattern '{pattern}' matches no trainable parameter.")
        parts.append(_scale_groups(_by_path(trainable, lambda path: _first(config.learning_rate_scales, path))))
    rate = schedule(config, num_steps)
    parts.append(optax.scale_by_schedule(lambda step: -rate(step)))
    return optax.chain(*parts)


def _by_path(tree: dict, value: Callable[[str], object]) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: value("/".join(key.key for key in path)), tree)


def _first(scales: tuple[tuple[str, float], ...], path: str) -> float:
    return next((factor for pattern, factor in scales if re.match(pattern, path)), 1.0)


def _scale_groups(factors: dict) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors))
