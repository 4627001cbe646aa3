"""What the towers and the decoder share: projections, norms, activations and the layer stack.

Every parameter carries logical axis names (`nn.with_logical_partitioning`) and every large activation a logical
constraint; which mesh axis a name means is decided elsewhere, by one table of rules.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxvlm.config import ConfigError, LoRAConfig
from jaxvlm.kernels.attention import attention
from jaxvlm.kernels.decode_attention import decode_attention
from jaxvlm.parallel.rules import active, active_spec, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),  # SigLIP, Gemma
    "gelu_erf": partial(jax.nn.gelu, approximate=False),  # DINOv2, and torch's default
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

normal_init = nn.initializers.normal(0.02)
WIDTHS = ("embed", "vision_embed")


def whole(parameter: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as products use it: FSDP stores it split along its width, and here its parts are gathered.

    Said so, because the compiler may prefer to move activations. How it is stored is said for its gradient's sake, of which
    the same holds: it would be summed whole on every device for the gradient norm, which reads all of it.
    """
    stored = constrain(parameter, axes, "a parameter")
    return constrain(stored, tuple(None if axis in WIDTHS else axis for axis in axes), "a parameter in use")


def lookup(table: jax.Array, indices: jax.Array, axes: tuple[str | None, str]) -> jax.Array:
    """Rows [B, S, D] of a table [V, D] with these logical axes, at int32 `indices` [B, S]; NaN beyond its end.

    On a mesh each device looks in its own part of the table, gathered along the width, and what they find is added up:
    left to itself the compiler exchanges activations for the gradient.
    """
    if active() is None:
        return jnp.take(table, indices, axis=0)
    table_spec, spec = (
        active_spec(axes, table.shape, "a table"),
        active_spec(("batch", "length"), indices.shape, "tokens"),
    )
    rows, width = ((axis,) if axis else () for axis in table_spec)
    tokens = {axis for axes in spec for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis}

    def local(part, indices):
        # Said to differ before it is gathered: so its gradient is scattered along the width, and the small parts added up.
        part = jax.lax.pcast(part, tuple(tokens - {*rows, *width}), to="varying")
        part = jax.lax.all_gather(part, width, axis=1, tiled=True)
        own = indices - jax.lax.axis_index(rows) * len(part)
        own = jnp.where(own < 0, len(part), own)  # another device's
        return jax.lax.psum(part.at[own].get(mode="fill", fill_value=0), rows)

    x = jax.shard_map(local, in_specs=(table_spec, spec), out_specs=PartitionSpec(*spec, None))(table, indices)
    return jnp.where((indices < len(table))[..., None], x, jnp.nan)


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axes: tuple[str, ...],
    k_start: jax.Array | None = None,
    k_end: jax.Array | None = None,
    **options,
) -> jax.Array:
    """`kernels.attention` on every device's own rows, heads and queries; `axes` name q's [B, S, H] (k's heads: 'kv_heads'
    for 'heads').

    A kernel sees arrays of one device, since the compiler cannot split it. Where the length is split, each device
    gathers the row's keys and values and answers its own queries, whose intervals count in the whole row.
    """
    if active() is None:
        return attention(q, k, v, k_start=k_start, k_end=k_end, **options)

    def spec(x, *names):
        return active_spec(names, x.shape, "attention")

    rows, length, heads = axes
    q_spec = spec(q, *axes, None)
    i_spec = None if k_start is None else spec(k_start, rows, length)
    kv_spec = spec(k, rows, length, "kv_heads" if heads == "heads" else heads, None)
    if q_spec[2] != kv_spec[2]:  # fewer key heads than devices along `tensor`: one for each, some of them the same
        copies = jax.sharding.get_abstract_mesh().shape[q_spec[2]] // k.shape[2]
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        kv_spec = spec(k, rows, length, heads, None)

    def local(q, k, v, k_start, k_end):
        if kv_spec[1] is not None:
            k, v = (jax.lax.all_gather(x, kv_spec[1], axis=1, tiled=True) for x in (k, v))
        return attention(q, k, v, k_start=k_start, k_end=k_end, **options)

    specs = dict(in_specs=(q_spec, kv_spec, kv_spec, i_spec, i_spec), out_specs=q_spec)
    return jax.shard_map(local, check_vma=False, **specs)(
        q, k, v, k_start, k_end
    )  # kernels do not say over what they vary


def sharded_decode_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, *, k_start: jax.Array, k_end: jax.Array, **options
) -> jax.Array:
    """`kernels.decode_attention` of q [B, 1, H, h] on every device's own rows and heads of the caches [L, B, K, T, h]."""
    if q.shape[1] != 1:
        raise ValueError(f"A cache that holds something is followed by one token a row, not by {q.shape[1]}.")
    q, k_start, k_end = q[:, 0], k_start[:, 0], k_end[:, 0]

    def local(q, k, v, layer, k_start, k_end):
        return decode_attention(q, k, v, layer, k_start=k_start, k_end=k_end, **options)

    if active() is None:
        return local(q, k, v, layer, k_start, k_end)[:, None]
    q_spec = active_spec(("batch", "heads", None), q.shape, "attention")
    kv_spec = active_spec((None, "batch", "kv_heads", None, None), k.shape, "the cache")
    if q_spec[1] != kv_spec[2]:  # as in `sharded_attention`
        copies = jax.sharding.get_abstract_mesh().shape[q_spec[1]] // k.shape[2]
        k, v = (jnp.repeat(x[layer][None], copies, axis=2) for x in (k, v))
        layer, kv_spec = jnp.int32(0), active_spec((None, "batch", "heads", None, None), k.shape, "the cache")
    rows = PartitionSpec(q_spec[0])
    specs = dict(in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(), rows, rows), out_specs=q_spec)
    return jax.shard_map(local, check_vma=False, **specs)(q, k, v, layer, k_start, k_end)[:, None]


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name not in ACTIVATIONS:
        raise ConfigError(f"No activation '{name}'; there are: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def uniform_fan_in(fan_in: int):
    """torch's default for linear layers, weight and bias alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (recipes §1.1 A2)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Projection(nn.Module):
    """x [..., *shape_in] times a kernel [*shape_in, *shape_out], plus a bias and a low-rank adapter if asked for.

    The adapter (Hu et al. 2021, eq. 3) is `x · lora_a · lora_b * alpha / rank`; `lora_b` starts at zero, so a fresh
    adapter changes nothing. Its x is dropped out when there is a random stream 'dropout', which only training gives.
    """

    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    axes_in: tuple[str | None, ...]
    axes_out: tuple[str | None, ...]
    dtype: jnp.dtype
    bias: bool = False
    lora: LoRAConfig = LoRAConfig()
    kernel_init: Callable = normal_init
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._contract(x, "kernel", self.shape_in, self.shape_out, self.axes_in + self.axes_out, self.kernel_init)
        if self.bias:
            init = nn.with_logical_partitioning(self.bias_init, self.axes_out)
            bias = self.param("bias", init, self.shape_out).astype(self.dtype)
            flat = y.reshape(*y.shape[: y.ndim - bias.ndim], -1)  # as a vector, which cuBLAS adds to its product
            y = (flat + bias.reshape(-1)).reshape(y.shape)
        if self.lora.rank and self.name in self.lora.targets:
            rank, init_a = (self.lora.rank,), uniform_fan_in(math.prod(self.shape_in))
            if self.lora.dropout and self.has_rng("dropout"):
                x = nn.Dropout(self.lora.dropout, deterministic=False)(x)
            low = self._contract(x, "lora_a", self.shape_in, rank, (*self.axes_in, "lora"), init_a)
            zeros = nn.initializers.zeros
            update = self._contract(low, "lora_b", rank, self.shape_out, ("lora", *self.axes_out), zeros)
            y = y + update * (self.lora.alpha / self.lora.rank)
        return y

    def _contract(self, x, name, shape_in, shape_out, axes, init):
        kernel = self.param(name, nn.with_logical_partitioning(init, axes), (*shape_in, *shape_out))
        kernel = whole(kernel.astype(self.dtype), axes).reshape(math.prod(shape_in), -1)
        lead = x.shape[: x.ndim - len(shape_in)]
        if _context() > 1:  # rows and length are split both: together they are no dimension that can be
            return (x.reshape(*lead, -1) @ kernel).reshape(*lead, *shape_out)
        # Two plain matrices: XLA's CPU backend copies transposes for the weight gradient of anything else.
        return (x.reshape(-1, math.prod(shape_in)) @ kernel).reshape(*lead, *shape_out)


def _context() -> int:
    found = active()
    return found[0].shape["context"] if found else 1


def layer_norm(eps: float, dtype: jnp.dtype, axis: str, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with float32 statistics by the exact two-pass variance; `axis` names its parameters' dimension."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (axis,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axis,)),
        name=name,
    )


class RMSNorm(nn.Module):
    """The norm of Zhang & Sennrich (2019), in float32 whatever the compute dtype; `axis` names the last dimension.

    With `plus_one` the scale is 1 + the parameter (Gemma).
    """

    eps: float
    dtype: jnp.dtype
    axis: str
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(init, (self.axis,)), (x.shape[-1],))
        scale = scale.astype(jnp.float32) + self.plus_one
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(self.dtype)


ATTENTION = ("attention_out", "attention_lse")  # what it names of its results: with both a kernel is not run again


def _and_attention(keeps: Callable) -> Callable:
    """The policy `keeps`, and what attention gives, whose kernel is no product that it knows."""
    named = jax.checkpoint_policies.save_only_these_names(*ATTENTION)
    return lambda *primitive, **params: named(*primitive, **params) or keeps(*primitive, **params)


def _keep_results(primitive, *_, **__) -> bool:
    """All but what costs no arithmetic, so that parameters are gathered anew: kept, they would be the whole model."""
    return primitive.name not in ("sharding_constraint", "reshape", "convert_element_type")


# What the backward pass finds in memory, from most recomputation to least; it recomputes the rest. Beside each layer's input:
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,  # nothing
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION),  # what attention gives
    # the same, and in the host's memory the products with parameters
    "offload": _and_attention(jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")),
    "dots": _and_attention(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),  # both, on the device
    "none": _keep_results,  # all results
}


def stack(layer: type[nn.Module], depth: int, remat: str, in_axes: tuple, unroll: bool = False) -> type[nn.Module]:
    """`depth` copies of `layer` as one scanned module; their parameters gain a leading axis named 'layers'.

    `layer.__call__(carry, *inputs)` returns (carry, None). `in_axes` says of each input whether layers share it
    (`nn.broadcast`) or scan over its axis 0. `remat` is a name of `REMAT_POLICIES`. With `unroll` the program has `depth` layers
    after one another, which keep their results where they are computed.
    """
    if remat not in REMAT_POLICIES:
        raise ConfigError(f"model.remat must be one of {', '.join(REMAT_POLICIES)}, not '{remat}'.")
    # A loop keeps the compiler from merging what is computed again with the first time. Unrolled, it may where products are
    # kept: it then keeps what they read as well.
    prevent = unroll and remat not in ("none", "dots")
    layer = nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=prevent)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=depth if unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
