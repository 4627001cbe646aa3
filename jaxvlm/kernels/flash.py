"""What the flash kernels share: a forward and a backward kernel as one differentiable function."""

from collections.abc import Callable
from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name


def differentiable(forward: Callable, backward: Callable) -> Callable[..., jax.Array]:
    """`out` of (q, k, v, k_start, k_end, settings), with the gradients of q, k and v.

    `forward(q, k, v, k_start, k_end, settings)` gives (out, lse); `backward(q, k, v, out, lse, d_out, k_start, k_end, settings)`
    the three gradients. Output and lse carry the names of `kernels.attention`, so that a rematerialisation policy can keep
    them and the forward kernel is not run again.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(5,))
    def run(q, k, v, k_start, k_end, settings):
        return forward(q, k, v, k_start, k_end, settings)[0]

    def save(q, k, v, k_start, k_end, settings):
        found = forward(q, k, v, k_start, k_end, settings)
        out, lse = map(checkpoint_name, found, ("attention_out", "attention_lse"))
        return out, (q, k, v, out, lse, k_start, k_end)

    def pull(settings, saved, d_out):
        q, k, v, out, lse, k_start, k_end = saved
        return *backward(q, k, v, out, lse, d_out, k_start, k_end, settings), None, None

    run.defvjp(save, pull)
    return run
