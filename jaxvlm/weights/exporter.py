"""A model as a llava-hf folder, with the key names of that hub's checkpoints (recipes §3.2).

transformers and vLLM load those names; what transformers itself writes today, vLLM does not (ecosystem §3.2).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxvlm.config import ModelConfig, PromptConfig
from jaxvlm.weights import axes as layout
from jaxvlm.weights import hf_files
from jaxvlm.weights.families import CLIP, CONNECTOR, LLAMA, SIGLIP, Family
from jaxvlm.weights.families.llava import LLAVA_EXPORT
from jaxvlm.weights.readers import WeightsError


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its name, size, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def export_llava_hf(
    params: dict,
    model: ModelConfig,
    prompt: PromptConfig,
    out: str | Path,
    *,
    dtype: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a folder that `LlavaForConditionalGeneration.from_pretrained` and vLLM load; gives its path back.

    Adapters are merged. The vision layers after the selected features, which this package does not keep, are written
    as zeros: they are computed and discarded there. A tokenizer without `<image>` gets it, as an id of its own, and
    the embedding rows for it (the mean of the others) if the vocabulary has no room. `dtype` casts (None keeps each
    tensor's own). Raises `WeightsError` with all the reasons if no class of transformers computes this model.
    """
    _require_exportable(model)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is not empty. Give another folder for the export.")
    if model.llm.lora.rank:
        from jaxvlm.models.lora import merge_lora

        params = params | {"llm": merge_lora(params["llm"], model.llm)}
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tokenizer = hf_files.copy_tokenizer(Path(prompt.tokenizer), work)
        rows = model.llm.vocab_size
        if tokenizer.image_id >= rows:
            rows = -(-(tokenizer.image_id + 1) // 64) * 64  # whole tiles, as on the hub
        tensors = list(_tensors(params, model, rows, dtype))
        _write_shards(tensors, work, shard_bytes)
        hf_files.write_configs(model, prompt, tokenizer, rows, str(tensors[-1].dtype), work)
        work.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def _family(model: ModelConfig) -> Family | None:
    """The HF tower with exactly these traits."""
    v = model.vision
    if v.kind != "vit" or v.layer_scale or v.num_registers:
        return None
    if v.class_token and v.pre_norm and not v.patch_bias:
        return CLIP
    return SIGLIP if v.patch_bias and not (v.class_token or v.pre_norm) else None


def _require_exportable(model: ModelConfig) -> None:
    reasons = []
    if _family(model) is None:
        reasons.append("LLaVA there takes a CLIP or SigLIP tower, and this one is neither")
    if model.vision.feature_norm:
        reasons.append("the tower's final norm is applied to the features (vision.feature_norm)")
    if model.vision.pool != 1:
        reasons.append("visual tokens are pooled (vision.pool)")
    if model.connector.kind != "mlp2x_gelu":
        reasons.append(f"the connector is '{model.connector.kind}', not 'mlp2x_gelu'")
    if model.connector.input_norm:
        reasons.append("the connector starts with a norm (connector.input_norm)")
    if reasons:
        raise WeightsError(
            "No model class of transformers computes this model: "
            + "; ".join(reasons)
            + ". Keep the run's own format (jaxvlm.load, jaxvlm serve)."
        )


# ------------------------------------------------------------------------------------------------------------- tensors


def _tensors(params: dict, model: ModelConfig, rows: int, dtype: Any) -> Iterator[_Tensor]:
    parts = {
        "vision": (_family(model), model.vision),
        "connector": (CONNECTOR, model),
        "llm": (LLAMA, model.llm),
    }
    for part, (family, config) in parts.items():
        for tensor in _part_tensors(flatten_dict(params[part], sep="/"), family, config):
            if part == "llm":
                tensor = replace(tensor, name=("" if tensor.name.startswith("lm_head") else "model.") + tensor.name)
                if rows > model.llm.vocab_size and tensor.name.endswith(("embed_tokens.weight", "lm_head.weight")):
                    tensor = _with_rows(tensor, rows)
            tensor = replace(tensor, name=LLAVA_EXPORT[part] + tensor.name)
            yield tensor if dtype is None else _cast(tensor, jnp.dtype(dtype))


def _part_tensors(leaves: dict[str, Any], family: Family, config: Any) -> Iterator[_Tensor]:
    sizes = family.sizes(config)
    used = set()
    for rule in family.active(config):
        if rule.path not in leaves:
            raise WeightsError(f"The parameters lack {family.part}/{rule.path}, which the configuration asks for.")
        leaf = leaves[rule.path]
        used.add(rule.path)
        file, ours = layout.parse(rule.axes)
        shape = (len(family.layers(config)),) * rule.stacked + layout.shape(ours, sizes)
        if leaf.shape != shape:
            raise WeightsError(
                f"{family.part}/{rule.path} is {list(leaf.shape)}, the configuration says {list(shape)}."
            )

        def make(rule=rule, leaf=leaf, layer=None) -> np.ndarray:
            value = _gathered(leaf if layer is None else leaf[layer])
            return np.ascontiguousarray(layout.convert(value, layout.reverse(rule.axes), sizes))

        shape = layout.shape(file, sizes)
        if not rule.stacked:
            yield _Tensor(rule.names[0], shape, np.dtype(leaf.dtype), make)
            continue
        for layer in range(config.depth):
            kept = layer in family.layers(config)
            build = (lambda make=make, layer=layer: make(layer=layer)) if kept else _constant(0, shape, leaf.dtype)
            yield _Tensor(rule.names[0].replace("{i}", str(layer)), shape, np.dtype(leaf.dtype), build)
    if family.part == "vision":  # the norm after the discarded layers
        width, kind = (config.width,), leaves["pos_embed"].dtype
        yield _Tensor("post_layernorm.weight", width, np.dtype(kind), _constant(1, width, kind))
        yield _Tensor("post_layernorm.bias", width, np.dtype(kind), _constant(0, width, kind))
    if extra := sorted(set(leaves) - used):
        raise WeightsError(f"These parameters have no place in the export: {', '.join(extra)} (in {family.part}).")


def _constant(value: float, shape: tuple[int, ...], dtype: Any) -> Callable[[], np.ndarray]:
    return lambda: np.full(shape, value, dtype)


def _gathered(value: Any) -> np.ndarray:
    """The whole array on this host, also when its shards live on several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _with_rows(tensor: _Tensor, rows: int) -> _Tensor:
    """More vocabulary rows, all the mean of the present ones: near no word, and never the likeliest next token."""

    def make() -> np.ndarray:
        table = tensor.make()
        mean = table.mean(0, keepdims=True, dtype=np.float32).astype(table.dtype)
        return np.concatenate([table, np.repeat(mean, rows - len(table), 0)])

    return replace(tensor, shape=(rows, *tensor.shape[1:]), make=make)


def _cast(tensor: _Tensor, dtype: np.dtype) -> _Tensor:
    return replace(tensor, dtype=dtype, make=lambda: tensor.make().astype(dtype))


def _write_shards(tensors: list[_Tensor], folder: Path, shard_bytes: int) -> None:
    """Safetensors files of at most `shard_bytes` (one tensor at least), and their index when there are several."""
    from safetensors.numpy import save_file

    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {tensor.name: tensor.make() for tensor in shard}
        if jax.process_index() == 0:
            save_file(values, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(values, name)
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        text = json.dumps({"metadata": total, "weight_map": dict(sorted(index.items()))}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
