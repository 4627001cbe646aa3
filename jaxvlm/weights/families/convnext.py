"""ConvNeXt as transformers names it. Its table follows from the configuration: how many stages of how many blocks."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxvlm.config import VisionConfig
from jaxvlm.models.convnext import STEM, feature_stages
from jaxvlm.weights.families.base import Family, Rule, dense
from jaxvlm.weights.families.vit import IMAGENET_MEAN, IMAGENET_STD, normalisation, square
from jaxvlm.weights.hf_config import activation
from jaxvlm.weights.readers import WeightsError

# What the modules are called in the file, after 'stages.{number}.' where they are of a stage.
HF_NAMES = {
    "stem": "embeddings.patch_embeddings",
    "stem_norm": "embeddings.layernorm",
    "stages": "encoder.stages",
    "downsample_norm": "downsampling_layer.0",
    "downsample": "downsampling_layer.1",
    "blocks": "layers",
    "depthwise": "dwconv",
    "norm": "layernorm",
    "up": "pwconv1",
    "down": "pwconv2",
    "scale": "layer_scale_parameter",
}
_DEFAULTS = {
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "hidden_act": "gelu",
    "layer_scale_init_value": 1e-6,
    "image_size": 224,
    "patch_size": STEM,
}


def convnext(name: str, names: dict[str, str], unused: tuple[tuple[str, str], ...], **rest) -> Family:
    """A family of ConvNeXts whose modules have these `names` in the file."""

    def table(config: VisionConfig) -> tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]]:
        rules = (*_patches(names["stem"], "stem", "C0 C p q"), *_norm(names["stem_norm"], "stem_norm", "C0"))
        needed = max(feature_stages(config)) + 1
        for number in range(needed):
            rules += _stage(names, number, config)
        behind = "|".join(str(number) for number in range(needed, len(config.stage_depths)))
        skipped = rf"{re.escape(names['stages'])}\.({behind})\..*", "stages after the selected features"
        return rules, (*unused, skipped) if behind else unused

    return Family(
        name=name,
        part="vision",
        rules=(),
        unused=(),
        table=table,
        sizes=_sizes,
        conditions=lambda config: {"layer_scale": config.layer_scale},
        layers=lambda config: range(0),
        **rest,
    )


def _stage(names: dict[str, str], number: int, config: VisionConfig) -> tuple[Rule, ...]:
    key, path, wide, narrow = f"{names['stages']}.{number}.", f"stages_{number}/", f"F{number}", f"C{number}"
    rules: tuple[Rule, ...] = ()
    if number:
        before = f"C{number - 1}"
        rules = _norm(key + names["downsample_norm"], f"{path}downsample_norm", before)
        rules += _patches(key + names["downsample"], f"{path}downsample", f"{narrow} {before} two Two")
    block, to = f"{key}{names['blocks']}.{{i}}.", f"{path}blocks/"
    blocks = (
        Rule(f"{block}{names['depthwise']}.weight", f"{to}depthwise/kernel", f"{narrow} I y x -> y x I {narrow}"),
        Rule(f"{block}{names['depthwise']}.bias", f"{to}depthwise/bias", f"{narrow} -> {narrow}"),
        *_norm(block + names["norm"], f"{to}norm", narrow),
        *dense(block + names["up"], f"{to}up", f"{wide} {narrow} -> {narrow} {wide}"),
        *dense(block + names["down"], f"{to}down", f"{narrow} {wide} -> {wide} {narrow}"),
        Rule(block + names["scale"], f"{to}scale", f"{narrow} -> {narrow}", when="layer_scale"),
    )
    layers = range(config.stage_depths[number])
    return rules + tuple(dataclasses.replace(rule, layers=layers) for rule in blocks)


def _norm(key: str, path: str, axis: str) -> tuple[Rule, Rule]:
    axes = f"{axis} -> {axis}"
    return Rule(f"{key}.weight", f"{path}/scale", axes), Rule(f"{key}.bias", f"{path}/bias", axes)


def _patches(key: str, path: str, file: str) -> tuple[Rule, Rule]:
    """A convolution that reads each cell once; `file` names the axes of its kernel: outputs, inputs, rows, columns."""
    out, inner, rows, columns = file.split()
    return (
        Rule(f"{key}.weight", f"{path}/kernel", f"{file} -> {rows} {columns} {inner} {out}"),
        Rule(f"{key}.bias", f"{path}/bias", f"{out} -> {out}"),
    )


def _sizes(config: VisionConfig) -> dict[str, int]:
    sizes = {"C": 3, "p": STEM, "q": STEM, "two": 2, "Two": 2, "I": 1, "y": 7, "x": 7}
    for number, width in enumerate(config.stage_widths):
        sizes |= {f"C{number}": width, f"F{number}": 4 * width}
    return sizes


def convnext_config(depths, widths, image_size: int, **traits) -> VisionConfig:
    """The last stage's output, whose cells are 32 pixels wide in a tower of four stages."""
    return VisionConfig(
        kind="convnext",
        image_size=image_size,
        patch_size=STEM * 2 ** (len(depths) - 1),
        stage_depths=tuple(depths),
        stage_widths=tuple(widths),
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        feature_layers=(-1,),
        **traits,
    )


def configure(given: dict, folder: Path) -> VisionConfig:
    c = _DEFAULTS | given
    if square(c, "patch_size", folder) != STEM:
        raise WeightsError(f"{folder}: a ConvNeXt with patch_size {c['patch_size']} is not supported; {STEM} is.")
    traits = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | normalisation(folder)
    return convnext_config(
        c["depths"],
        c["hidden_sizes"],
        square(c, "image_size", folder),
        activation=activation(c["hidden_act"], folder),
        norm_eps=1e-6,  # whatever `layer_norm_eps` says, which is of the classifier's norm alone
        layer_scale=c["layer_scale_init_value"] > 0,
        **traits,
    )


CONVNEXT = convnext(
    "convnext",
    HF_NAMES,
    ((r"layernorm\..*", "the classifier's norm"), (r"classifier\..*", "the classifier")),
    prefixes=(r"convnext\.",),
    model_types={"convnext": _DEFAULTS},
    configure=configure,
)
