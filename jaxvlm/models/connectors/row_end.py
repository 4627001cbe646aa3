"""The learned token that the layout puts at the end of each row of visual tokens (LLaVA-NeXT's `image_newline`)."""

import flax.linen as nn
import jax

from jaxvlm.config import ModelConfig


def row_end(module: nn.Module, config: ModelConfig) -> jax.Array | None:
    """`module`'s parameter `newline` [D], drawn as LLaVA-NeXT and Cambrian draw it; None without `row_end`."""
    if not config.connector.row_end:
        return None
    init = nn.with_logical_partitioning(nn.initializers.normal(config.llm.width**-0.5), ("embed",))
    return module.param("newline", init, (config.llm.width,))
