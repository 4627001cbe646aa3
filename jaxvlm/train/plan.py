"""What a stage's step needs and costs, from its compiled program and from arithmetic; no weights, no data.

The step is the one that `train.loop` runs: same function, optimiser, shardings and donation, over shapes alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jaxvlm.config import MeshConfig, RunConfig, StageConfig
from jaxvlm.data.instruction import instruction_fields
from jaxvlm.data.packing import assemble
from jaxvlm.data.tiles import tile_regions, tiling, tower_names
from jaxvlm.kernels.cross_entropy import usual_chunk
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.parallel.mesh import require_rows_divide
from jaxvlm.parallel.rules import batch_sharding, logical_rules
from jaxvlm.parallel.traffic import Traffic, traffic
from jaxvlm.train.flops import batch_flops, trainable_shares
from jaxvlm.train.loop import state_shardings
from jaxvlm.train.optimizer import make_optimizer
from jaxvlm.train.state import TrainState, cast, count, flat, merge, split
from jaxvlm.train.step import loss_sums, make_step, step_options

# Samples of an epoch, by the name of the file; counted by their authors. Others say it in their name ('..._mix1231k').
SAMPLES = {"llava_v1_5_mix665k": 665_298, "blip_laion_cc_sbu_558k": 558_128}
TILES_WHEN_TILED = 5  # an AnyRes image of 2 x 2 tiles and its whole


class Assumptions(NamedTuple):
    """What only data or a run could tell."""

    mfu: float = 0.4
    tokens_per_sample: int = 900  # LLaVA-1.5's mixture is about that with an image's 576; used where rows are packed
    tiles_per_row: int = 0  # 0: the config's, or one image a row
    samples: int = 0  # 0: by the sources' file names


# --------------------------------------------------------------------------------------------------------- what is shaped


def abstract_state(config: RunConfig, stage: StageConfig, mesh: Mesh) -> tuple[TrainState, Any]:
    """The stage's TrainState as ShapeDtypeStructs with their shardings, and its optimiser."""
    trainable, frozen = split(abstract_params(config.model), stage.trainable)
    frozen = jax.eval_shape(lambda tree: cast(tree, jnp.dtype(config.model.dtype)), frozen)
    trainable = jax.eval_shape(lambda tree: cast(tree, jnp.float32), trainable)
    optimizer = make_optimizer(stage.optimizer, 1000, trainable)  # the schedule's length is a constant in the program
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, trainable, frozen, jax.eval_shape(optimizer.init, trainable))
    return _placed(state, state_shardings(state, config.model, mesh, stage.optimizer.offload)), optimizer


def abstract_batch(config: RunConfig, stage: StageConfig, tiles: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The stage's global batch, field by field as `data.loader` makes it, of `tiles` tile slots a row."""
    prompt = stage_prompt(config, stage)
    cut, model = tiling(config.model, prompt), config.model
    row = assemble([], prompt.length, cut.tile_tokens, blends=cut.blends)
    row |= {"tile_mask": np.zeros(tiles, bool)} | tile_regions(cut, [], tiles)
    if model.connector.reads_text:
        row |= instruction_fields([], [], tiles, prompt.qformer_length)
    fields = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in row.items()}
    if stage.cache_features:
        shapes = [(tiles, part.num_tokens, part.feature_width) for part in model.vision.parts]
        shapes = shapes if model.connector.kind == "sva" else [(*shapes[0][:2], sum(shape[2] for shape in shapes))]
        fields |= {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))
            for name, shape in zip(tower_names("features", len(shapes)), shapes, strict=True)
        }
    else:
        for name, (size, _) in zip(tower_names("pixels", len(cut.views)), cut.views, strict=True):
            fields[name] = jax.ShapeDtypeStruct((tiles, size, size, 3), jnp.uint8)
    return {name: jax.ShapeDtypeStruct((stage.batch_size, *field.shape), field.dtype) for name, field in fields.items()}


def stage_prompt(config: RunConfig, stage: StageConfig) -> Any:
    """The run's prompt as the stage changes it."""
    changes = {key: getattr(stage.data, key) for key in ("template", "transform", "length")}
    return dataclasses.replace(config.prompt, **{key: value for key, value in changes.items() if value is not None})


def tile_slots(config: RunConfig, stage: StageConfig, assumed: Assumptions) -> tuple[int, str]:
    """Tile slots a row, and where the number is from."""
    if assumed.tiles_per_row:
        return assumed.tiles_per_row, "given"
    if stage.data.tiles_per_row:
        return stage.data.tiles_per_row, "config"
    prompt = stage_prompt(config, stage)
    per_image = TILES_WHEN_TILED if tiling(config.model, prompt).tiled else 1
    images = math.ceil(prompt.length / assumed.tokens_per_sample) if stage.data.packing else 1
    return images * per_image, f"estimate, {images} image(s) a row of {per_image} tile(s)"


def fitted_mesh(mesh: MeshConfig, stage: StageConfig, devices: int, slices: int) -> MeshConfig:
    """The config's mesh; where it is left as it comes, one that the stage's rows divide over.

    `data` takes the slices, `fsdp` as much as the rows of a micro-batch allow, `tensor` what is left.
    """
    if mesh != MeshConfig():
        return mesh
    rows, within = stage.batch_size // stage.accumulate, devices // slices
    fsdp = math.gcd(rows // math.gcd(rows, slices), within)
    return dataclasses.replace(mesh, data=slices, fsdp=fsdp, tensor=within // fsdp)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


# ------------------------------------------------------------------------------------------------------ what is compiled


def compile_step(
    config: RunConfig, stage: StageConfig, mesh: Mesh, tiles: int, platform: str
) -> tuple[Any, TrainState, str]:
    """The stage's compiled step for the devices of `mesh`, the abstract state it takes, and its HLO text.

    Raises `ConfigError` for rows or parameters that do not divide over the mesh, and jax's own error (RESOURCE_EXHAUSTED)
    where the compiler finds that the program does not fit.
    """
    require_rows_divide(stage, mesh)
    state, optimizer = abstract_state(config, stage, mesh)
    batch = abstract_batch(config, stage, tiles)
    batch = _placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
    step = make_step(VLM(config.model), optimizer, max(1, len(stage.data.sources)), stage.accumulate)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh):  # only now: nothing can be computed on devices that are not there
        lowered = jitted.trace(state, batch).lower(lowering_platforms=(platform,))
        options = step_options(config.model)
    if platform != "tpu":
        compiled = lowered.compile(compiler_options=options)
        return compiled, state, compiled.as_text()
    # A libtpu newer than jaxlib writes asynchronous instructions that `as_text` cannot read; its own dump is the same text.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (dump,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, state, dump.read_text()


def memory(compiled: Any, state: TrainState, activations: int) -> dict[str, int]:
    """Bytes on one device by kind. The state's are exact, `temporaries` (`activations` among them) and `peak` the compiler's."""
    found = compiled.memory_analysis()
    kinds = {"trainable": state.trainable, "frozen": state.frozen, "optimizer": state.opt_state}
    made = {name: sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in kinds.items()}
    made["batch"] = max(found.argument_size_in_bytes - sum(made.values()), 0)
    made["arguments"] = found.argument_size_in_bytes
    made["outputs"] = found.output_size_in_bytes
    made["activations"] = activations
    made["temporaries"] = found.temp_size_in_bytes  # activations, gradients, gathered weights, buffers of collectives
    whole = made["arguments"] + made["outputs"] - found.alias_size_in_bytes + made["temporaries"]
    made["peak"] = max(getattr(found, "peak_memory_in_bytes", 0), 0) or whole
    return made


def activations(config: RunConfig, stage: StageConfig, state: TrainState, mesh: Mesh, tiles: int) -> int:
    """Bytes on one device, about, that the forward pass of a micro-batch keeps for the backward pass; part of `temporaries`.

    By jax's own account of what backward reads, less what has the shape of a parameter, evenly divided over data x fsdp x
    context. The compiler may fuse some of it away; what `tensor` splits is counted whole.
    """
    batch = abstract_batch(config, dataclasses.replace(stage, batch_size=stage.batch_size // stage.accumulate), tiles)

    def backward(trainable: dict, frozen: dict, batch: dict, weights: jax.Array) -> Any:
        return jax.vjp(
            lambda moving: loss_sums(VLM(config.model), merge(moving, frozen), batch, weights, 1)[0], trainable
        )[1]

    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
        kept = jax.eval_shape(backward, state.trainable, state.frozen, batch, batch["loss_weights"])
    parameters = {leaf.shape for leaf in jax.tree.leaves((state.trainable, state.frozen))}
    parameters |= {shape[1:] for shape in parameters}  # of one layer
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.shape not in parameters]
    return sum(sizes) // (mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"])


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def exchanged(hlo: str, mesh: Mesh, tokens: int) -> list[Traffic]:
    """What devices exchange in a step. The loss is taken to go through all `tokens` of a micro-batch, evenly divided."""
    with jax.set_mesh(mesh):
        chunk = usual_chunk()
    own = tokens / (mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"])
    return traffic(hlo, mesh, math.ceil(own / chunk))


# ---------------------------------------------------------------------------------------------------- what is computed


def parameters(state: TrainState) -> dict[str, dict[str, int]]:
    """Numbers of parameters by part: {'llm': {'all': ..., 'trainable': ...}, ...}."""
    parts: dict[str, dict[str, int]] = {}
    for tree, moves in ((state.trainable, True), (state.frozen, False)):
        for part, subtree in tree.items():
            entry = parts.setdefault(part, {"all": 0, "trainable": 0})
            entry["all"] += count(subtree)
            entry["trainable"] += moves * count(subtree)
    return parts


def step_flops(config: RunConfig, stage: StageConfig, state: TrainState, tiles: int, tokens: int) -> dict[str, float]:
    """Model FLOPs of a step by part, for rows without padding in which every token is supervised.

    That is what a device works through whatever the rows hold: padding is computed too. Attention is counted causal within
    segments of `tokens` tokens (a whole row where rows are not packed). Recomputation is not counted.
    """
    length = stage_prompt(config, stage).length
    places = np.arange(length)
    segment = min(tokens, length) if stage.data.packing else length
    row = {
        "segment_ids": places // segment + 1,
        "positions": places % segment,
        "visual_index": np.where(places < tiles * config.model.tile_tokens, places, -1),
        "loss_weights": np.ones(length),
        "tile_mask": np.ones(tiles, bool),
    }
    if not stage.cache_features:
        row["pixels"] = np.empty(0)
    if config.model.connector.reads_text:
        row["qformer_mask"] = np.ones((tiles, stage_prompt(config, stage).qformer_length), bool)
    share = trainable_shares(flat(state.trainable), flat(state.frozen))
    one = batch_flops(config.model, {name: value[None] for name, value in row.items()}, share)
    return {part: stage.batch_size * flops for part, flops in one.items()}


def stage_steps(config: RunConfig, stage: StageConfig, assumed: Assumptions) -> tuple[int, int, str]:
    """(steps, samples, where the samples are from); zeros where nothing says how many there are."""
    length = stage_prompt(config, stage).length
    per_row = max(1.0, length / assumed.tokens_per_sample) if stage.data.packing else 1.0
    if stage.steps:
        return stage.steps, round(stage.steps * stage.batch_size * per_row), "the config's steps"
    known = [(assumed.samples, "given")] if assumed.samples else [_named(source) for source in stage.data.sources]
    samples = round(sum(number for number, _ in known) * (stage.epochs or 1.0))
    if not known or not all(number for number, _ in known):
        return 0, 0, "unknown: give --samples"
    return math.ceil(samples / per_row / stage.batch_size), samples, known[0][1]


def _named(source: Any) -> tuple[int, str]:
    """A source's samples by the name of its file."""
    stem = source.path.rsplit("/", 1)[-1].split(".")[0]
    if stem in SAMPLES:
        return round(SAMPLES[stem] * source.fraction), f"{stem} as published"
    thousands = re.search(r"(\d+)k$", stem)
    return (round(int(thousands[1]) * 1000 * source.fraction), "the file's name") if thousands else (0, "unknown")
