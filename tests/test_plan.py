"""The planner: targets, the traffic in a compiled program, a stage from shapes alone, and one small TPU topology."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxvlm import planner
from jaxvlm.config import ConfigError, MeshConfig
from jaxvlm.main import load_config, main
from jaxvlm.parallel.mesh import AXES, make_mesh
from jaxvlm.parallel.plan_targets import CHIPS, Target, known_targets, link_seconds, parse_target
from jaxvlm.parallel.traffic import Traffic, traffic
from jaxvlm.train import plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("name", "devices", "platform", "domain"),
    [
        ("v5e-256", 256, "tpu", 256),
        ("2xv5e-16", 32, "tpu", 16),
        ("h100-64", 64, "cuda", 8),
        ("a100-40g-4", 4, "cuda", 4),
    ],
)
def test_targets(name, devices, platform, domain):
    target = parse_target(name)
    assert (target.devices, target.platform, target.domain) == (devices, platform, domain)


def test_every_known_target_parses():
    assert {parse_target(name).name for name in known_targets()} == set(known_targets())


@pytest.mark.parametrize(
    ("name", "says"), [("h101-8", "'h100-8'"), ("v5e-255", "'v5e-256'"), ("2xh100-8", "h100-16"), ("", "v5e-")]
)
def test_unknown_targets_name_the_nearest_and_all(name, says):
    with pytest.raises(ConfigError, match=says):
        parse_target(name)


def test_a_missing_compiler_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", str(CONFIGS / "llava15.py"), "--target", "v5e-8"]) == 1
    assert "pip install -e '.[plan-tpu]'" in capsys.readouterr().err


def test_an_unknown_stage_names_those_there_are(capsys):
    assert main(["plan", str(CONFIGS / "llava15.py"), "--target", "v5e-8", "--stage", "tune"]) == 1
    assert "align, instruct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "accumulate", "devices", "slices", "expected"),
    [
        (128, 1, 64, 1, (1, 64, 1)),
        (128, 1, 256, 1, (1, 128, 2)),
        (128, 4, 64, 1, (1, 32, 2)),
        (128, 1, 32, 2, (2, 16, 1)),
        (6, 1, 8, 1, (1, 2, 4)),
    ],
)
def test_the_mesh_fits_the_rows(rows, accumulate, devices, slices, expected):
    stage = dataclasses.replace(
        load_config(f"{CONFIGS}/llava15.py:tiny").stages[1], batch_size=rows, accumulate=accumulate
    )
    mesh = plan.fitted_mesh(MeshConfig(), stage, devices, slices)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == expected
    given = MeshConfig(data=3)
    assert plan.fitted_mesh(given, stage, devices, slices) is given


# ------------------------------------------------------------------------------------------------------------- traffic


def hlo_of(function, mesh, *arrays):
    shaped = [
        jax.ShapeDtypeStruct(x, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in arrays
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*shaped).lower().compile().as_text()


def test_traffic_counts_what_a_loop_sends_once_a_trip():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def step(x):
        def body(x, _):
            return jax.lax.psum(x, "b") * 0.5, None

        return jax.lax.psum(jax.lax.scan(body, x, None, length=7)[0], ("a", "b"))

    mapped = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    found = traffic(hlo_of(mapped, mesh, ((64, 32), ())), mesh)
    size = 64 * 32 * 4
    assert sorted((each.kind, each.axes, each.times, each.group, each.wire_bytes) for each in found) == [
        ("all-reduce", ("a", "b"), 1, 8, 2 * size * 7 // 8),
        ("all-reduce", ("b",), 7, 4, 2 * size * 3 // 4),
    ]


def test_traffic_of_a_loop_as_long_as_the_data():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def step(x):
        return jax.lax.fori_loop(0, x[0].astype(int), lambda i, x: jax.lax.psum(x, "a"), x)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    assert [each.times for each in traffic(hlo_of(mapped, mesh, ((16,), ())), mesh, data_trips=5)] == [5]


TPU_HLO = """
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%started (p: bf16[1,4]) -> bf16[8,4] {
  ROOT %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}
}

%ended (p: bf16[1,4]) -> bf16[8,4] {
  ROOT %all-gather.2 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%started
  %d = bf16[8,4]{1,0} fusion(%s), kind=kCustom, calls=%ended
  %ar = f32[8,4]{1,0} all-reduce(%d), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %slice = f32[2,4]{1,0} dynamic-slice(%ar, %i), dynamic_slice_sizes={2,4}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) while(%t), condition=%cond, body=%body
}
"""


def test_traffic_of_a_tpu_program():
    """Its loops have their bound in the condition, and an asynchronous collective stands in several fusions."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    gather, scatter = traffic(TPU_HLO, mesh)
    assert (gather.kind, gather.axes, gather.times, gather.wire_bytes) == (
        "all-gather",
        ("a", "b"),
        7,
        8 * 4 * 2 * 7 // 8,
    )
    assert (scatter.kind, scatter.axes, scatter.times, scatter.wire_bytes) == (
        "reduce-scatter",
        ("b",),
        7,
        8 * 4 * 4 * 3 // 4,
    )


def test_links_inside_and_between_hosts():
    chip = CHIPS["h100"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), jax.devices())
    one = {"kind": "all-gather", "shape": "", "times": 3, "wire_bytes": 10**9, "op_name": ""}
    inside, across = Traffic(axes=("fsdp",), group=4, **one), Traffic(axes=("data",), group=2, **one)
    two_hosts = Target("", chip, 8)._replace(chips=8)
    seconds = link_seconds(two_hosts, mesh, [inside, across])
    assert seconds == pytest.approx({"fsdp": 3e9 / chip.link, "data": 3e9 / chip.link})  # one host of eight
    # Slices of four: `data` crosses them, one device of each by itself.
    slices = Target("", CHIPS["v5e"], 4, 2)
    assert link_seconds(slices, mesh, [across])["data"] == pytest.approx(3e9 / CHIPS["v5e"].network)
    # All eight together: a gigabyte that each would send is shared by the four of a slice.
    both = Traffic(axes=("data", "fsdp"), group=8, **one)
    assert link_seconds(slices, mesh, [both])["data+fsdp"] == pytest.approx(3e9 / 4 / CHIPS["v5e"].network)


# ------------------------------------------------------------------------------------------------------------- a stage


@pytest.fixture(scope="module")
def report():
    """Both stages of the toy LLaVA on the eight simulated devices, as `--dry_run` makes it."""
    overrides = [f"--config.stages[{i}].batch_size=8" for i in (0, 1)] + ["--config.prompt.length=128"]
    return planner.dry_run(load_config(f"{CONFIGS}/llava15.py:tiny", overrides))


def test_parameters_and_state_are_exact(report):
    align, instruct = report["stages"]
    width, vocab, vision = 64, 32000, 32
    connector = vision * width + width + width * width + width
    layer = 4 * width * width + 3 * width * 128 + 2 * width
    llm = 2 * vocab * width + 2 * layer + width
    assert align["parameters"]["connector"] == {"all": connector, "trainable": connector}
    assert align["parameters"]["llm"] == {"all": llm, "trainable": 0}
    assert instruct["parameters"]["llm"] == {"all": llm, "trainable": llm}
    assert instruct["parameters"]["vision"]["trainable"] == 0
    # float32, split over eight but for the bias of the connector's first layer, whose axis is not one that is split.
    trainable = 4 * ((llm + connector - width) // 8 + width)
    assert instruct["bytes"]["trainable"] == trainable
    assert instruct["bytes"]["optimizer"] == 2 * trainable + 2 * 4  # two moments, two counters
    assert instruct["bytes"]["arguments"] == sum(
        instruct["bytes"][kind] for kind in ("trainable", "frozen", "optimizer", "batch")
    )


def test_activations_grow_with_what_remat_keeps():
    """With `full` the layers keep their inputs and no more: 100 layers more are 100 inputs more. Others keep more."""

    def kept(remat: str, depth: int, accumulate: int = 1) -> int:
        config = load_config(
            f"{CONFIGS}/llava15.py:tiny", [f"--config.model.remat={remat}", f"--config.model.llm.depth={depth}"]
        )
        stage = dataclasses.replace(config.stages[1], batch_size=8, accumulate=accumulate)
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
        state, _ = plan.abstract_state(config, stage, mesh)
        return plan.activations(config, stage, state, mesh, 1)

    length, width = load_config(f"{CONFIGS}/llava15.py:tiny").prompt.length, 64
    one_input = 8 * length * width * 4 // 4  # float32, over data x fsdp
    assert kept("full", 103) - kept("full", 3) == pytest.approx(100 * one_input, rel=1e-5)  # and a byte of the loop's
    assert kept("full", 3) < kept("dots", 3) < kept("none", 3)
    assert kept("full", 103, accumulate=2) - kept("full", 3, accumulate=2) == pytest.approx(50 * one_input, rel=1e-5)


def test_the_steps_are_those_of_an_epoch(report):
    align, instruct = report["stages"]
    assert (align["samples"], align["steps"]) == (558_128, 69_766)
    assert (instruct["samples"], instruct["steps"]) == (665_298, 83_163)
    assert instruct["hours"] * 3600 == pytest.approx(instruct["steps"] * instruct["step_seconds"])
    assert instruct["step_seconds"] >= max(instruct["bounds"].values())


def test_fsdp_sends_weights_forward_and_back(report):
    """At least: every matrix gathered twice and its gradient summed once, in float32 here."""
    weights = report["stages"][1]["bytes"]["trainable"] * 8 - 2 * 32000 * 64 * 4
    sent = sum(size for kinds in report["stages"][1]["sent"].values() for size in kinds.values())
    assert set(report["stages"][1]["sent"]) == {"fsdp"}
    assert sent > 3 * weights * 7 / 8


def test_the_batch_is_the_loaders(tmp_path):
    """Field by field, with pixels and with cached features, as the loader makes it of the toy's data."""
    from jaxvlm import job
    from jaxvlm.data.assets import resolve_assets

    config = resolve_assets(load_config(f"{CONFIGS}/quickstart.py:tiny"))
    stage = dataclasses.replace(config.stages[1], cache_features=False)
    config = dataclasses.replace(config, stages=(config.stages[0], stage))
    loader = job.stage_loader(1, config)
    batch = next(iter(loader.batches(0)))
    planned = plan.abstract_batch(config, stage, loader.tiles_per_row)
    assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
        name: (np.shape(x), x.dtype) for name, x in batch.items()
    }


def test_a_batch_that_does_not_divide_is_told(capsys):
    overrides = ["--config.stages[1].batch_size=12", "--config.mesh.fsdp=8"]
    with pytest.raises(ConfigError, match=r"instruct.*12 rows.*multiple of 8"):
        planner.dry_run(load_config(f"{CONFIGS}/llava15.py:tiny", [*overrides, "--config.stages[0].batch_size=8"]))


def test_the_search_ends_at_the_last_batch_that_fits(monkeypatch):
    """Where each policy holds another number of rows; every one is tried once, from below."""
    room, tried = {"none": 0, "dots": 3, "full": 1000}, []

    def fits(config, number, *_):
        rows = config.stages[number].batch_size // 4
        tried.append((config.model.remat, rows))
        return {"fits": rows <= room[config.model.remat]}

    monkeypatch.setattr(planner, "plan_stage", fits)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    config = load_config(f"{CONFIGS}/llava15.py:tiny")
    found = planner.largest_batches(config, 1, parse_target("h100-8"), mesh, plan.Assumptions())
    assert found == {"none": 0, "dots": 2, "full": planner.MOST_ROWS}
    assert tried[:4] == [("none", 1), ("dots", 1), ("dots", 2), ("dots", 4)]


def test_text_says_what_is_fact_and_what_is_estimate(report):
    said = planner.text(report)
    assert "Stage align" in said and "Stage instruct" in said and "fits" in said
    assert "Compiler's word" in said and "Estimates" in said
    json.dumps(report)


@pytest.mark.parametrize(("spec", "devices"), [("prismatic.py:model=prism-dinosiglip+7b", 8), ("quickstart.py", 1)])
def test_presets_are_planned_without_their_files(spec, devices):
    """Shapes, shardings and FLOPs of every stage of the presets; nothing is read, nothing compiled."""
    config = load_config(f"{CONFIGS}/{spec}")
    for stage in config.stages:
        sizes = plan.fitted_mesh(config.mesh, stage, devices, 1)
        mesh = make_mesh(sizes, jax.devices()[:devices])
        tiles, _ = plan.tile_slots(config, stage, plan.Assumptions())
        state, _ = plan.abstract_state(config, stage, mesh)
        batch = plan.abstract_batch(config, stage, tiles)
        assert batch["tokens"].shape == (stage.batch_size, plan.stage_prompt(config, stage).length)
        assert sum(plan.step_flops(config, stage, state, tiles, 900).values()) > 0
        assert mesh.axis_names == AXES


# ------------------------------------------------------------------------------------------------- the real compilers


def test_a_small_tpu_topology():
    """The toy's second stage, by XLA:TPU, in a process of its own."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[plan-tpu]'")
    config = load_config(f"{CONFIGS}/llava15.py:tiny", ["--config.prompt.length=128"])
    report = planner.plan_elsewhere(config, "v5e-4", plan.Assumptions(), ("instruct",))
    (stage,) = report["stages"]
    assert stage["fits"] and stage["mesh"]["fsdp"] == 4
    assert 0 < stage["bytes"]["peak"] < CHIPS["v5e"].memory
    assert sum(stage["sent"]["fsdp"].values()) > 0


@pytest.mark.plan
@pytest.mark.parametrize(
    ("target", "headroom"), [("v5e-256", 0.5), ("v5p-64", 0.5), ("v6e-16", 0.2), ("a100-8", 0.3), ("h100-8", 0.3)]
)
def test_llava_15_7b_fits(target, headroom):
    """Stage 2 of the recipe, batch 128 rows of 2,048, on five machines; with room to spare that docs/plans.md states."""
    report = planner.plan_elsewhere(load_config(f"{CONFIGS}/llava15.py"), target, plan.Assumptions(), ("instruct",))
    (stage,) = report["stages"]
    assert stage["fits"], stage.get("refused")
    assert stage["bytes"]["peak"] < (1 - headroom) * stage["limit"]
