"""Rotary positions (Su et al. 2021), with the stretched kinds that Hugging Face's checkpoints name."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm.config import ConfigError, RopeScalingConfig

UNSCALED = RopeScalingConfig()


def rotary_angles(
    positions: jax.Array,
    dim: int,
    theta: float,
    scaling: RopeScalingConfig = UNSCALED,
    stretched: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, S, 1, dim / 2], at int32 `positions` [B, S].

    Args:
        dim: how many dimensions of each head turn.
        stretched: bool [B], which rows take longrope's long factors; only that kind reads it.

    Raises:
        ConfigError: a kind of scaling that there is not, or longrope factors of the wrong number.
    """
    wavelengths = (theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)  # over 2 pi
    if scaling.kind == "longrope":
        factors = [np.asarray(each, np.float32) for each in (scaling.short_factor, scaling.long_factor)]
        if any(each.shape != wavelengths.shape for each in factors):
            raise ConfigError(f"llm.rope_scaling needs {len(wavelengths)} short and as many long factors.")
        short, long = (1 / (each * wavelengths) for each in factors)
        frequencies = jnp.where(stretched[:, None, None, None], long, short)  # [B, 1, 1, dim / 2]
    else:
        frequencies = _scale(1 / wavelengths, theta, scaling)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scaling.attention_factor, jnp.sin(angles) * scaling.attention_factor


def _scale(frequencies: np.ndarray, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "yarn":
        stretched = _yarn_ramp(len(frequencies), theta, scaling)
        return frequencies * (1 - stretched) + frequencies / np.float32(scaling.factor) * stretched
    if scaling.kind != "llama3":
        known = "default, linear, llama3, yarn or longrope"
        raise ConfigError(f"llm.rope_scaling.kind must be {known}, not '{scaling.kind}'.")
    # Llama 3.1: waves shorter than the pre-training length stay, those much longer are stretched, smoothly between.
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def _yarn_ramp(count: int, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    """How far each of `count` frequencies is stretched, float32 from 0 to 1: YaRN (Peng et al. 2023), eq. 23, over the
    numbers of frequencies, rounded outwards, as transformers does it.
    """

    def number(turns: float) -> float:  # of the frequency that turns so often over the original length
        return count * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(number(scaling.beta_fast)), 0)
    last = min(math.ceil(number(scaling.beta_slow)), 2 * count - 1)
    numbers = np.arange(count, dtype=np.float32)
    return np.clip((numbers - first) / np.float32(last - first or 0.001), 0, 1)


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the first dimensions of x [B, S, H, h], twice as many as `cos` [B, S, 1, n] has; the others stay.

    The layout is Llama's: of the dimensions that turn, i is paired with i + n. The angles get no gradient.
    """
    n = cos.shape[-1]
    first, second = x[..., :n].astype(jnp.float32), x[..., n : 2 * n].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([each.astype(x.dtype) for each in turned] + [x[..., 2 * n :]], axis=-1)


def _pull(angles: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = angles
    return rotate(gradient, cos, -sin), None, None  # back by the same angle; jax's own gradient pads and adds halves


rotate.defvjp(lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)), _pull)
