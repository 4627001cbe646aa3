"""The decoder against transformers, and its own invariances: cache, padding, packing, adapters."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_copy import llm as copy_llm
from hf_copy import random_params, randomise

from jaxvlm.config import ConfigError, LLMConfig, LoRAConfig, ModelConfig, RopeScalingConfig, VisionConfig
from jaxvlm.kernels import intervals
from jaxvlm.models.lora import merge_lora
from jaxvlm.models.vlm import VLM, abstract_params, init_cache, logical_axes
from jaxvlm.parallel.rules import logical_rules
from jaxvlm.train.step import loss_sums

LLAMA = LLMConfig(vocab_size=40, width=24, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32, norm_eps=1e-6)
# Between them, everything that LLAMA does not have.
GEMMA = replace(
    LLAMA,
    norm="rms_plus_one",
    post_norms=True,
    qk_norm=True,
    activation="gelu_tanh",
    tie_embeddings=True,
    embed_scale=5.0,
    attn_scale=0.4,
    attn_softcap=2.0,
    logit_softcap=3.0,
    sliding_window=3,
    full_layers=(1,),
    rope_local_theta=100.0,
)
PHI = replace(
    LLAMA,
    norm="layer",
    parallel=True,
    activation="gelu_tanh",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
    rope_fraction=0.5,
)
OPT = replace(PHI, parallel=False, activation="relu", head_bias=False, learned_positions=True, max_positions=16)
VISION = VisionConfig(image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=16)


def model(config: LLMConfig, **changes) -> ModelConfig:
    return ModelConfig(vision=VISION, llm=config, dtype="float32", **({"remat": "none"} | changes))


@partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params, tokens, segment_ids, positions):
    """logits [B, S, V] of text rows."""
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    batch["visual_index"] = jnp.full_like(tokens, -1)
    vlm = VLM(config)
    hidden = vlm.apply({"params": params}, batch)
    return vlm.apply({"params": params}, hidden, method="logits")


def plain(tokens):
    """segment_ids and positions of unpadded, unpacked rows."""
    return np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def close(found, expected, tolerance=2e-5):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_logits_equal_transformers(family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = {
        "Llama": LLAMA,
        "Mistral": replace(LLAMA, sliding_window=4, rope_theta=1e6, norm_eps=1e-5),
        "Qwen2": replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    }[family]
    settings = dict(
        vocab_size=ours.vocab_size,
        hidden_size=ours.width,
        intermediate_size=ours.mlp_dim,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=ours.tie_embeddings,
        attn_implementation="eager",
    )
    if ours.sliding_window:
        settings["sliding_window"] = ours.sliding_window
    config = getattr(transformers, f"{family}Config")(**settings)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    params = {"llm": copy_llm(randomise(theirs), ours)}
    tokens = np.random.default_rng(0).integers(0, ours.vocab_size, (2, 11)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    close(forward(model(ours), params, tokens, *plain(tokens)), expected)
    if ours.sliding_window:  # the window is what makes them equal
        other = forward(model(replace(ours, sliding_window=None)), params, tokens, *plain(tokens))
        assert np.abs(np.asarray(other) - expected).max() > 1e-2 * np.abs(expected).max()


def test_prefill_and_steps_equal_the_full_forward():
    config = model(replace(LLAMA, sliding_window=3))
    params, vlm = random_params(config), VLM(config)
    lengths, room, prompt = np.array([7, 4]), 12, 7
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 40, n + 3).astype(np.int32) for n in lengths]  # each prompt and three tokens more

    expected = []
    for row in rows:
        padded = np.zeros((1, 10), np.int32)
        padded[0, : len(row)] = row
        segment_ids = (np.arange(10) < len(row)).astype(np.int32)[None]
        expected.append(np.asarray(forward(config, params, padded, segment_ids, np.arange(10)[None]))[0, : len(row)])

    @jax.jit
    def decode(tokens, positions, k_start, k_end, cache):
        hidden, cache = vlm.apply(
            {"params": params}, tokens, None, None, positions, k_start, k_end, cache, method="decode"
        )
        return vlm.apply({"params": params}, hidden, method="logits"), cache

    # Left-padded to a common length: the pad slots lie in no query's interval.
    tokens = np.stack([np.pad(row[:n], (prompt - n, 0)) for row, n in zip(rows, lengths, strict=True)])
    first = (prompt - lengths)[:, None]
    k_start, k_end = intervals.causal((np.arange(prompt) >= first).astype(np.int32))
    positions = np.maximum(np.arange(prompt) - first, 0)
    # What the cache held before cannot leak: fill it.
    cache = jax.tree.map(lambda x: x + 1e30, init_cache(config.llm, 2, room, "float32"))
    logits, cache = decode(tokens, positions, k_start, k_end, cache)
    for b, n in enumerate(lengths):
        close(logits[b, prompt - n :], expected[b][:n])
    for step in range(3):
        tokens = np.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])[:, None]
        slot = np.full((2, 1), prompt + step)
        logits, cache = decode(tokens, slot - first, first, slot + 1, cache)
        for b, n in enumerate(lengths):
            close(logits[b, 0], expected[b][n + step])
    assert int(cache["index"]) == prompt + 3


def test_call_with_a_cache_is_a_prefill():
    config = model(LLAMA)
    tokens = np.arange(6, dtype=np.int32)[None]
    segment_ids, positions = plain(tokens)
    batch = dict(tokens=tokens, segment_ids=segment_ids, positions=positions, visual_index=tokens * 0 - 1)
    call = jax.jit(lambda params, *args: VLM(config).apply({"params": params}, *args))
    hidden = call(random_params(config), batch)
    again, cache = call(random_params(config), batch, init_cache(config.llm, 1, 9, jnp.float32))
    close(again, hidden, 1e-6)
    assert int(cache["index"]) == 6 and np.asarray(cache["k"])[..., 6:, :].max() == 0


@pytest.mark.parametrize("llm", [GEMMA, OPT], ids=["gemma", "opt"])
def test_packed_segments_equal_separate_rows(llm):
    config = model(llm)
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 40, (1, 10)).astype(np.int32)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 0]], np.int32)
    packed = forward(config, params, tokens, segment_ids, positions)[0]
    for start, end in ((0, 4), (4, 7), (7, 8)):
        alone = np.zeros_like(tokens)
        alone[0, : end - start] = tokens[0, start:end]
        ids = (np.arange(10) < end - start).astype(np.int32)[None]
        close(packed[start:end], forward(config, params, alone, ids, np.arange(10)[None])[0, : end - start])


def test_rematerialisation_and_unrolling_change_nothing():
    tokens = np.arange(8, dtype=np.int32)[None]
    params = random_params(model(LLAMA))

    def gradient(remat, unroll=None):
        """Of two leaves: one inside the layers and one before them, so the backward pass goes through everything."""

        def loss(norm, embedding):
            llm = params["llm"] | {"embed": {"embedding": embedding}}
            llm["layers"] = llm["layers"] | {"attn_norm": norm}
            return forward(model(LLAMA, remat=remat, unroll=unroll), {"llm": llm}, tokens, *plain(tokens)).var()

        return jax.tree.leaves(
            jax.grad(loss, (0, 1))(params["llm"]["layers"]["attn_norm"], params["llm"]["embed"]["embedding"])
        )

    kept = gradient("none")
    for how in (("dots",), ("full",), ("dots", True), ("full", True)):
        for one, other in zip(gradient(*how), kept, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_full_layers_see_beyond_the_window():
    """With one layer of each kind, the window of the other must not be what limits; with none, it must."""
    tokens = np.random.default_rng(2).integers(0, 40, (1, 9)).astype(np.int32)
    changed = tokens.copy()
    changed[0, 0] += 1

    def reaches(full_layers):  # how far the first token is felt
        config = model(replace(GEMMA, depth=1, full_layers=full_layers))
        params = random_params(config)
        one, other = (forward(config, params, t, *plain(t))[0] for t in (tokens, changed))
        return int(np.flatnonzero(np.abs(one - other).max(-1))[-1])

    assert reaches(()) == 2 and reaches((0,)) == 8


def test_longrope_chooses_at_the_prompt_and_keeps_the_choice():
    """The keys in the cache are already turned, so a short prompt's answer goes on with the short factors."""
    scaling = RopeScalingConfig("longrope", original_max_positions=6, short_factor=(1.0,) * 4, long_factor=(3.0,) * 4)
    config = model(replace(LLAMA, depth=1, rope_scaling=scaling))
    params, vlm = random_params(config), VLM(config)

    @jax.jit
    def step(tokens, positions, k_end, cache):
        args = (tokens, None, None, positions, k_end * 0, k_end, cache)
        return vlm.apply({"params": params}, *args, method="decode")[1]

    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    k_end = np.where(np.arange(8) < [[8], [5]], np.arange(8) + 1, 0)  # the second row ends with padding
    cache = step(tokens, plain(tokens)[1], k_end, init_cache(config.llm, 2, 10, jnp.float32))
    assert cache["stretched"].tolist() == [True, False]
    cache = step(tokens[:, :1], np.full((2, 1), 7), np.full((2, 1), 9), cache)
    assert cache["stretched"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("llm", "targets", "where"),
    [
        (LLAMA, ("q", "o", "down"), {"attn/q", "attn/o", "mlp/down"}),
        (PHI, LoRAConfig().targets, {"attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down"}),
    ],
    ids=["llama", "phi"],
)
def test_adapters(llm, targets, where):
    lora = LoRAConfig(rank=3, alpha=6.0, targets=targets)
    base, config = model(llm), model(replace(llm, lora=lora))
    leaves = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    adapted = {name.rsplit("/", 1)[0] for name in leaves if "lora" in name}
    assert adapted == {f"llm/layers/{each}" for each in where}

    params = random_params(config)
    tokens = np.arange(8, dtype=np.int32)[None]
    merged = merge_lora(params, config.llm)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract_params(base))
    close(forward(base, merged, tokens, *plain(tokens)), forward(config, params, tokens, *plain(tokens)), 5e-6)

    fresh = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key != "lora_b"), params)
    close(
        forward(config, fresh, tokens, *plain(tokens)),
        forward(base, merge_lora(fresh, config.llm), tokens, *plain(tokens)),
        1e-7,
    )


def test_tied_head_is_the_transposed_embedding():
    config = model(replace(LLAMA, tie_embeddings=True))
    params = random_params(config)
    assert "head" not in params["llm"]
    hidden = np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)
    close(
        VLM(config).apply({"params": params}, hidden, method="logits"),
        hidden @ np.asarray(params["llm"]["embed"]["embedding"]).T,
    )


def test_training_loss_is_of_the_models_own_logits():
    config = model(replace(PHI, logit_softcap=3.0))  # and PHI's head has a bias
    params = random_params(config)
    tokens = np.random.default_rng(4).integers(0, 40, (2, 7)).astype(np.int32)
    segment_ids, positions = plain(tokens)
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "visual_index": tokens * 0 - 1}
    batch |= {"targets": np.roll(tokens, -1, 1), "loss_weights": np.ones(tokens.shape, np.float32)}
    batch["source_ids"] = tokens * 0
    loss = jax.jit(lambda p: loss_sums(VLM(config), p, batch, batch["loss_weights"] / tokens.size, 1)[0])(params)
    log_probs = jax.nn.log_softmax(forward(config, params, tokens, segment_ids, positions))
    np.testing.assert_allclose(loss, -np.take_along_axis(log_probs, batch["targets"][..., None], -1).mean(), rtol=1e-5)


@pytest.mark.parametrize("llm", [GEMMA, PHI, OPT], ids=["gemma", "phi", "opt"])
def test_every_parameter_has_a_place_on_the_mesh(llm):
    axes = jax.tree.leaves(logical_axes(model(llm))["llm"], is_leaf=lambda x: isinstance(x, tuple))
    assert {axis for leaf in axes for axis in leaf} <= {None, *dict(logical_rules())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "llm.norm must be"),
        ({"rope_scaling": RopeScalingConfig("dynamic")}, "llm.rope_scaling.kind must be"),
        ({"rope_scaling": RopeScalingConfig("longrope", short_factor=(1.0,))}, "needs 4 short and as many long"),
        ({"head_bias": True, "tie_embeddings": True}, "llm.head_bias needs a head of its own"),
        ({"activation": "swish"}, "No activation 'swish'"),
    ],
)
def test_settings_that_do_not_exist_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        abstract_params(model(replace(LLAMA, **change)))
