"""jaxvlm: train, evaluate and serve vision-language models in JAX.

`import jaxvlm` is light: it imports neither jax nor any other dependency until a name below is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxvlm.infer.engine import load

__version__ = "0.1.0"  # read by setup.py without importing the package
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports `load` when it is first used (PEP 562)."""
    if name == "load":
        from jaxvlm.infer.engine import load

        globals()["load"] = load
        return load
    raise AttributeError(f"module 'jaxvlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
