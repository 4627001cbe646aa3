"""What XLA is told where its defaults for GPUs cost a program of ours, as compiled modules and profiles show (docs/performance.md).

What XLA_FLAGS says of an option stands.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax

Options = dict[str, bool | int]

# Left to cuBLAS, and not merged, products read a layer's parameters where they lie in their stack; else they are copied first.
IN_PLACE: Options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
# The pass that does so also writes results where they are kept for gradients, for which a kernel is run a second time.
KEEPING: Options = {"xla_gpu_enable_dynamic_slice_fusion": False}


def compiler_options(platform: str, keeping: bool = False) -> Options:
    """For `jax.jit` or `compile`, on jax's `platform`. `keeping`: a loop over layers keeps results for gradients."""
    if platform not in ("gpu", "cuda"):
        return {}
    said = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in (KEEPING if keeping else IN_PLACE).items() if name not in said}


class LateJit:
    """What `jax.jit` makes, made at the first use: only then is the backend known, and started."""

    def __init__(self, function: Callable, how: dict):
        self._function, self._how = function, how

    @functools.cached_property
    def _made(self) -> Callable:
        return jax.jit(self._function, compiler_options=compiler_options(jax.default_backend()), **self._how)

    def __call__(self, *arguments):
        return self._made(*arguments)

    def __getattr__(self, name: str):  # `trace`, `lower` and the rest
        return getattr(self._made, name)


def jit(function: Callable, **how) -> Callable:
    """`jax.jit` with the `compiler_options` of the default backend."""
    return functools.update_wrapper(LateJit(function, how), function)
