"""The language model's head and its cross-entropy in one function, for supervised positions only.

Instruction data supervises a small part of its tokens, and the head of a small model with a large vocabulary costs as
much as all its layers. So the supervised tokens of all rows are moved to the front, and only as many chunks as they fill
are computed. No [.., V] array outlives its chunk: the gradients are made in the same loop that makes the loss (as Liger
Kernel does, Hsu et al. 2024), which also saves the backward pass its second product with the head.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxvlm.kernels.dispatch import backend


class Split(NamedTuple):
    """The mesh axes (of `jax.set_mesh`) over which the arguments of `linear_cross_entropy` are split."""

    rows: tuple[str, ...]
    length: tuple[str, ...]
    width: tuple[str, ...]  # of the kernel; hidden has its whole width everywhere
    vocab: tuple[str, ...]


ONE_DEVICE = Split((), (), (), ())


def usual_chunk() -> int:
    """Tokens in a chunk where the call does not say, on what the active mesh is made of.

    The head's gradient is read and written once for each chunk, so that fewer tokens would keep an accelerator waiting for
    its memory; more is more padding in the last chunk. A CPU computes less in the time that it takes to read a number.
    """
    return 128 if backend() == "cpu" else 1024


def linear_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    split: Split | None = None,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the next-token losses of a linear head.

    The gradient is computed together with the loss, so `weights` must already hold the normalisation: pass
    `loss_weights / total` for a mean. Then `loss` may be scaled by anything downstream.

    Args:
        hidden: [B, S, D]; its dtype is the compute dtype of the three products, which accumulate in float32.
        kernel: [D, V]; cast to hidden's dtype.
        targets: int32 [B, S]; not read where the weight is 0.
        weights: float32 [B, S]; tokens of weight 0 cost nothing beyond the padding of the last chunk.
        bias: [V], added to the logits in float32, or None.
        softcap: the logits become softcap * tanh(logits / softcap), after the bias.
        chunk: tokens that are computed at once, so that [chunk, V] float32 logits exist at a time; None for what suits the
            device.
        split: how the arrays lie on a mesh. Each device then goes through its own part of the rows; the kernel's width is
            gathered once before, and its gradient summed over devices once after the loop.
        transposed: the kernel is [V, D], as a table of embeddings is, which turned over would be copied.

    Returns:
        loss: float32 scalar, sum(weights * nll); differentiable with respect to `hidden`, `kernel` and `bias`, and to
            no more of them than is asked for: a frozen head costs no gradient product.
        nll: float32 [B, S], the negative log-likelihood where the weight is not 0, else 0. Carries no gradient.
    """
    if (
        targets.shape != hidden.shape[:2]
        or weights.shape != hidden.shape[:2]
        or kernel.shape[transposed] != hidden.shape[2]
    ):
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.shape}, kernel {kernel.shape}, targets {targets.shape} "
            f"and weights {weights.shape} do not fit together."
        )
    hidden, targets = jnp.asarray(hidden), jnp.asarray(targets)  # numpy's cannot be indexed in a loop
    chunk = chunk or usual_chunk()
    settings = chunk, softcap, split, transposed
    loss, nll = _weighted_sum(hidden, kernel, bias, targets, jax.lax.stop_gradient(weights), settings)
    return loss, jax.lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted_sum(hidden, kernel, bias, targets, weights, settings):
    return _compute(hidden, kernel, bias, targets, weights, settings)[:2]


def _forward(hidden, kernel, bias, targets, weights, settings):
    wanted = hidden.perturbed, kernel.perturbed, bias is not None and bias.perturbed
    bias = bias if bias is None else bias.value
    loss, nll, gradients = _compute(hidden.value, kernel.value, bias, targets.value, weights.value, settings, wanted)
    return (loss, nll), gradients


def _backward(settings, gradients, cotangents):
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    return *(None if each is None else (each * scale).astype(each.dtype) for each in gradients), None, None


_weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _compute(hidden, kernel, bias, targets, weights, settings, wanted=(False, False, False)):
    """Loss, nll and the wanted gradients of (hidden, kernel, bias); None stands for those not wanted."""
    chunk, softcap, split, transposed = settings
    local = partial(
        _local, chunk=chunk, softcap=softcap, split=split or ONE_DEVICE, transposed=transposed, wanted=wanted
    )
    if split is None:
        return local(hidden, kernel, bias, targets, weights)
    tokens, head, vocab = (
        PartitionSpec(*split[:2]),
        PartitionSpec(*_oriented(split[2:], transposed)),
        PartitionSpec(split.vocab),
    )
    in_specs = (tokens, head, vocab, tokens, tokens)
    out_specs = (PartitionSpec(), tokens, (tokens, head, vocab))
    # The gradients are made inside; nothing differentiates through the shards, so there is no variance to keep track of.
    shards = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return shards(hidden, kernel, bias, targets, weights)


def _oriented(width_vocab, transposed):
    return width_vocab[::-1] if transposed else width_vocab


def _local(hidden, kernel, bias, targets, weights, *, chunk, softcap, split, transposed, wanted):
    """`_compute` of one device's part; what it gives is summed over devices."""
    want_hidden, want_kernel, want_bias = wanted
    shards = split.rows + split.length
    shape, width = targets.shape, hidden.shape[2]
    hidden, targets, weights = hidden.reshape(-1, width), targets.reshape(-1), weights.reshape(-1)  # [N, D], [N]
    chunk = min(chunk, len(targets))
    padded = math.ceil(len(targets) / chunk) * chunk
    dv = _oriented("dv", transposed)
    width_axis = dv.index("d")
    head = jax.lax.all_gather(kernel.astype(hidden.dtype), split.width, axis=width_axis, tiled=True)
    first = jax.lax.axis_index(split.vocab) * head.shape[dv.index("v")]  # of this device's part of the vocabulary

    supervised = weights != 0
    order = jnp.argsort(~supervised, stable=True)  # [N], supervised tokens first
    rank = jnp.argsort(order)  # where each token went
    targets, weights = (jnp.pad(x[order], (0, padded - len(x))) for x in (targets, weights))
    order = jnp.pad(order, (0, padded - len(order)))
    fullest = jax.lax.pmax(jnp.sum(supervised), shards)
    num_chunks = (fullest + chunk - 1) // chunk  # the loop's length is data, and the same on all devices

    def body(i, carry):
        nll, dhidden, dkernel, dbias = carry
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        weight = take(weights)[:, None]  # [C, 1]
        x = jnp.where(weight != 0, hidden[take(order)], 0)  # what is not supervised may hold anything
        logits = jnp.einsum(f"cd,{dv}->cv", x, head, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        highest = jax.lax.pmax(jnp.max(logits, axis=-1, keepdims=True), split.vocab)
        total = jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)
        # A comparison and not a gather: of a vocabulary that is split, one device has the target and the others nothing.
        hit = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == take(targets)[:, None]
        right = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1, keepdims=True)
        total, right = jax.lax.psum((total, right), split.vocab)
        log_total = highest + jnp.log(total)
        nll = put(nll, jnp.where(weight != 0, log_total - right, 0.0)[:, 0])
        if any(wanted):
            dlogits = (jnp.exp(logits - log_total) - hit) * weight  # [C, V]
            if softcap is not None:
                dlogits = dlogits * (1 - jnp.square(logits / softcap))  # of tanh, by its value
            if want_bias:
                dbias = dbias + jnp.sum(dlogits, axis=0)
            dlogits = dlogits.astype(x.dtype)
        if want_hidden:
            dhidden = put(dhidden, jnp.einsum(f"cv,{dv}->cd", dlogits, head))
        if want_kernel:
            dkernel = dkernel + jnp.einsum(f"cd,cv->{dv}", x, dlogits, preferred_element_type=jnp.float32)
        return nll, dhidden, dkernel, dbias

    carry = (
        jnp.zeros(padded, jnp.float32),
        jnp.zeros((padded, width), hidden.dtype) if want_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if want_kernel else None,
        jnp.zeros(bias.shape, jnp.float32) if want_bias else None,
    )
    nll, dhidden, dkernel, dbias = jax.lax.fori_loop(0, num_chunks, body, carry)
    loss = jax.lax.psum(jnp.sum(nll * weights), shards)
    nll = nll[rank].reshape(shape)
    if want_hidden:
        dhidden = jax.lax.psum(dhidden[rank], split.vocab).reshape(*shape, width)
    if want_kernel:
        others = tuple(axis for axis in shards if axis not in split.width)
        # Scattered first: what crosses the other axes, slower networks among them, is a part.
        dkernel = jax.lax.psum_scatter(dkernel, split.width, scatter_dimension=width_axis, tiled=True)
        dkernel = jax.lax.psum(dkernel, others).astype(kernel.dtype)
    if want_bias:
        dbias = jax.lax.psum(dbias, shards).astype(bias.dtype)
    return loss, nll, (dhidden, dkernel, dbias)
