"""Connectors that checkpoints hold by themselves."""

from __future__ import annotations

from jaxvlm.weights.families.base import Family, dense

CONNECTOR = Family(
    name="llava-projector",
    part="connector",
    rules=(
        *dense("linear_1", "linear_1", "D V -> V D"),
        *dense("linear_2", "linear_2", "O D -> D O", when="two_layers"),
    ),
    unused=(),
    sizes=lambda config: {"V": config.vision.width, "D": config.llm.width, "O": config.llm.width},
    conditions=lambda config: {"two_layers": config.connector.kind == "mlp2x_gelu"},
    layers=lambda config: range(0),
)
