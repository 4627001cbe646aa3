"""The fused head and cross-entropy against optax on all logits."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvlm.kernels.cross_entropy import linear_cross_entropy

B, S, D, V = 3, 13, 8, 37


def example(seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    weights = (rng.random((B, S)) * (rng.random((B, S)) < share)).astype(np.float32)
    weights[1] = 0  # a row without a supervised position
    return hidden, kernel, targets, weights


def reference(hidden, kernel, targets, weights):
    nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets)
    return jnp.sum(nll * weights), nll * (weights != 0)


@partial(jax.jit, static_argnames=("function", "chunk"))
def with_gradients(function, args, **chunk):
    """((3 * loss, nll), gradients of 3 * loss)."""

    def scaled(hidden, kernel):
        loss, nll = function(hidden, kernel, *args[2:], **chunk)
        return 3 * loss, nll

    return jax.value_and_grad(scaled, (0, 1), has_aux=True)(*args[:2])


value = partial(jax.jit, static_argnames="chunk")(linear_cross_entropy)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_values_and_gradients(chunk, share):
    args = example(1, share)
    found, expected = with_gradients(linear_cross_entropy, args, chunk=chunk), with_gradients(reference, args)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
    loss, nll = value(*args, chunk=chunk)  # not differentiated: the other path through the function
    np.testing.assert_allclose(3 * loss, expected[0][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nll, expected[0][1], rtol=1e-5, atol=1e-6)


def test_a_kernel_as_the_embedding_lies():
    """[V, D]: the same values, and the gradient the other way round."""
    hidden, kernel, *rest = example(1)
    expected, (dhidden, dkernel) = with_gradients(linear_cross_entropy, (hidden, kernel, *rest), chunk=4)
    turned = partial(linear_cross_entropy, transposed=True)
    found, gradients = with_gradients(turned, (hidden, kernel.T, *rest), chunk=4)
    for one, other in zip(
        jax.tree.leaves((found, gradients)), jax.tree.leaves((expected, (dhidden, dkernel.T))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_bias_and_softcap():
    """The two additions together, and the gradient of the bias alone: a frozen kernel costs no product for it."""
    *args, bias = *example(1), np.random.default_rng(2).normal(size=V).astype(np.float32)

    def expected(hidden, kernel, bias):
        logits = 2.5 * jnp.tanh((hidden @ kernel + bias) / 2.5)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, args[2])
        return jnp.sum(nll * args[3])

    def found(hidden, kernel, bias):
        return linear_cross_entropy(hidden, kernel, *args[2:], bias=bias, softcap=2.5, chunk=4)[0]

    both = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args[:2], bias) for f in (found, expected)]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
    assert dots(jax.grad(found, 2), *args[:2], bias) == 1


def test_unsupervised_positions_may_hold_anything():
    hidden, kernel, targets, weights = example()
    _, clean = with_gradients(linear_cross_entropy, (hidden, kernel, targets, weights), chunk=4)
    off = weights == 0
    hidden[off], targets[off] = np.nan, -100
    (loss, nll), found = with_gradients(linear_cross_entropy, (hidden, kernel, targets, weights), chunk=4)
    assert np.isfinite(loss) and (np.asarray(nll)[off] == 0).all() and (np.asarray(found[0])[off] == 0).all()
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_hidden_states_with_a_float32_head():
    args = example()
    (expected, _), (_, expected_dkernel) = with_gradients(linear_cross_entropy, args, chunk=4)
    low = jnp.asarray(args[0], jnp.bfloat16)
    (loss, _), (dhidden, dkernel) = with_gradients(linear_cross_entropy, (low, *args[1:]), chunk=4)
    assert loss.dtype == jnp.float32 and dhidden.dtype == jnp.bfloat16 and dkernel.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=0.01)
    np.testing.assert_allclose(dkernel, expected_dkernel, atol=0.03 * np.abs(expected_dkernel).max())


def dots(function, *args):
    return jax.jit(function).lower(*args).as_text().count("dot_general")


def test_only_wanted_gradients_are_computed():
    hidden, kernel, targets, weights = example()

    def loss(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, targets, weights)[0]

    assert dots(loss, hidden, kernel) == 1
    assert dots(jax.grad(loss, 0), hidden, kernel) == 2  # a frozen head
    assert dots(jax.grad(loss, (0, 1)), hidden, kernel) == 3
    # and so inside the transformations a train step is made of
    assert dots(jax.grad(jax.checkpoint(loss), 0), hidden, kernel) == 2

    def accumulate(hidden, kernel):
        return jax.lax.scan(lambda total, h: (total + loss(h, kernel), None), 0.0, hidden[None])[0]

    assert dots(jax.grad(accumulate, 0), hidden, kernel) == 2


def test_no_array_holds_the_logits_of_all_tokens():
    batch, length, vocab, chunk = 2, 512, 1009, 16
    hidden = jax.ShapeDtypeStruct((batch, length, D), jnp.float32)
    kernel = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
    row = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)

    def loss(hidden, kernel, targets, weights):
        return linear_cross_entropy(hidden, kernel, targets, weights, chunk=chunk)[0]

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, row, weights).compile().as_text()
    shapes = [[int(n) for n in found.split(",")] for found in re.findall(r"(?:f32|pred|s32)\[([\d,]+)\]", text)]
    largest = max(np.prod(shape) for shape in shapes if vocab in shape)
    assert largest <= chunk * vocab < batch * length * vocab / 30


def test_work_grows_with_supervised_positions_only():
    """The loop's trip count is the number of chunks that they fill, in whatever rows they are: later ones are never entered."""
    hidden, kernel, targets, weights = example(share=1.0)
    weights[:, 2:] = 0
    weights[1:] = 0  # two tokens: one chunk of four
    visits = []
    spy = jnp.einsum

    def counting(spec, *args, **kwargs):
        out = spy(spec, *args, **kwargs)
        if spec == "cd,dv->cv":
            jax.debug.callback(lambda: visits.append(1))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "einsum", counting)
        linear_cross_entropy(hidden, kernel, targets, weights, chunk=4)
        jax.effects_barrier()
    assert len(visits) == 1


def test_shapes_that_do_not_fit_are_named():
    hidden, kernel, targets, weights = example()
    with pytest.raises(ValueError, match=r"kernel \(37, 8\)"):
        linear_cross_entropy(hidden, kernel.T, targets, weights)
