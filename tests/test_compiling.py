"""What XLA is told for GPUs, and which programs have their layers one by one."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from test_models_llm import LLAMA, VISION

from jaxvlm.config import ModelConfig
from jaxvlm.models import vlm
from jaxvlm.models.vlm import VLM, abstract_params, settled
from jaxvlm.parallel import compiling
from jaxvlm.parallel.compiling import compiler_options

MODEL = ModelConfig(vision=VISION, llm=LLAMA, dtype="float32")


def test_options_are_for_gpus_and_what_the_environment_says_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compiler_options("cpu") == compiler_options("tpu", keeping=True) == {}
    assert set(compiler_options("cuda")) == set(compiling.IN_PLACE)
    assert compiler_options("gpu", keeping=True) == compiling.KEEPING
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_gpu_autotune_level=0")
    assert set(compiler_options("gpu")) == set(compiling.IN_PLACE) - {"xla_gpu_enable_triton_gemm"}


@pytest.mark.parametrize("options", [compiling.IN_PLACE, compiling.KEEPING], ids=["in place", "keeping"])
def test_the_compiler_knows_the_options(options):
    """XLA refuses what it does not know, on a CPU too."""
    jax.jit(lambda x: x + 1, compiler_options=options)(1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_gpu_no_such_option": False})(1.0)


def test_jit_asks_for_the_backend_when_it_is_first_called(monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "compiler_options", lambda platform: asked.append(platform) or {})

    def double(x, times):
        """Doubles."""
        return x * 2 * times

    made = compiling.jit(double, static_argnums=1)
    assert made.__doc__ == "Doubles." and not asked
    assert made(2, 1) == 4 and made(3, 2) == 12 and asked == ["cpu"]
    assert made._cache_size() == 2 and "multiply" in made.lower(jnp.float32(1), 3).as_text()


@pytest.mark.parametrize(
    ("platform", "given", "found"), [("gpu", None, True), ("cpu", None, False), ("gpu", False, False)]
)
def test_layers_are_unrolled_on_one_gpu(platform, given, found, monkeypatch):
    monkeypatch.setattr(vlm, "backend", lambda: platform)
    assert settled(replace(MODEL, unroll=given)).unroll is found
    with jax.set_mesh(jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])):
        assert not settled(replace(MODEL, unroll=given)).unroll
    with jax.set_mesh(jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])):
        assert settled(replace(MODEL, unroll=given)).unroll is found


@pytest.mark.parametrize("unroll", [False, True])
def test_an_unrolled_program_has_no_loop_over_layers(unroll):
    config = replace(MODEL, unroll=unroll)
    row = jnp.ones((1, 4), jnp.int32)
    batch = {"tokens": row, "segment_ids": row, "positions": row, "visual_index": -row}
    hidden = jax.jit(lambda params: VLM(config).apply({"params": params}, batch)[0])
    assert ("stablehlo.while" in hidden.lower(abstract_params(config)).as_text()) is not unroll
