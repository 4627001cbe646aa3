"""Choosing a kernel: an ordered list of implementations for each backend, of which the first that supports a call serves it."""

import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import jax


class Implementation(NamedTuple):
    """`supports(q, k)` gives None, or the reason (a clause) why `run` cannot serve arrays of these shapes and types."""

    name: str
    supports: Callable[[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], str | None]
    run: Callable[..., jax.Array]  # the dispatcher's own arguments, by position


Implementations = dict[str, tuple[Implementation, ...]]  # of each backend, in order of preference; 'cpu' has XLA's

# The name of the implementation to take before the others, where it serves the call: see `attention.preferring`.
preferred: ContextVar[str | None] = ContextVar("preferred attention", default=None)


def backend() -> str:
    """What the mesh of `jax.set_mesh` is made of, which for the planner is not what this machine has."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def device_kind() -> str:
    """As `backend`, the kind of device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind


def choose(what: str, implementations: Implementations, q, k, forced: str | None) -> Implementation:
    """The first of this backend's that serves q and k; logs the choice once. `what` names the call in messages.

    Raises `ValueError` where the one that `forced` names is not there or cannot serve the call.
    """
    here = backend()
    backend_has = implementations.get(here, implementations["cpu"])
    names = [each.name for each in backend_has]
    if forced is not None and forced not in names:
        raise ValueError(f"{what}: no implementation '{forced}' for {here}; it has: {', '.join(names)}.")
    wanted = forced or preferred.get()
    reasons = [] if wanted is None or wanted in names else [f"{wanted}: not for {here}"]
    for each in sorted(backend_has, key=lambda each: each.name != wanted):
        if forced not in (None, each.name):
            continue
        reason = each.supports(q, k)
        if reason is None:
            _log_choice(what, here, each.name, tuple(reasons))
            return each
        reasons.append(f"{each.name}: {reason}")
    raise ValueError(f"{what} on {here}: {'; '.join(reasons)}.")


@cache  # once for each distinct choice
def _log_choice(what: str, here: str, name: str, passed_over: tuple[str, ...]) -> None:
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    logging.getLogger(__name__).info("%s on %s: %s%s", what, here, name, why)
