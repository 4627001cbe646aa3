"""Resizing of square grids exactly as torch's `F.interpolate` does it (align_corners = False): a matrix an axis.

`jax.image.resize` differs from it: its cubic kernel has a = -0.5, and beyond the border it drops cells where torch
repeats the last one. With antialiasing, torch does as Pillow does: a = -0.5, a kernel as wide as the shrinking asks
for, and no cells beyond the border.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def matrix(old: int, new: int, method: str) -> np.ndarray:
    """float32 weights [new, old] of `old` cells in each of `new`; by 'bilinear', 'bicubic' or 'bicubic_antialias'."""
    stride = np.float32(old) / np.float32(new)  # as torch rounds it: at 256 -> 96 cells it moves results by 5e-5
    centres = (np.arange(new, dtype=np.float32)[:, None] + 0.5) * stride - 0.5
    if method == "bicubic_antialias":
        weights = _cubic((np.arange(old) - centres) / max(stride, 1.0), -0.5)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    cells = np.arange(-2, old + 2)  # two beyond each border, which are the border's
    distance = cells - centres
    weights = np.maximum(1 - abs(distance), 0) if method == "bilinear" else _cubic(distance, -0.75)
    inside = weights[:, 2:-2].copy()
    inside[:, 0] += weights[:, :2].sum(1)
    inside[:, -1] += weights[:, -2:].sum(1)
    return inside.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel of Keys (1981)."""
    x = abs(x)
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def resize(grid: jax.Array, size: int, method: str) -> jax.Array:
    """[B, n, n, C] -> [B, size, size, C] of the same dtype, computed in float32."""
    if grid.shape[1] == size:
        return grid
    weights, exact = jnp.asarray(matrix(grid.shape[1], size, method)), jax.lax.Precision.HIGHEST
    rows = jnp.einsum("ia,zabc->zibc", weights, grid.astype(jnp.float32), precision=exact)
    return jnp.einsum("jb,zibc->zijc", weights, rows, precision=exact).astype(grid.dtype)
