"""Position embeddings for another image size than the tower was trained at.

Every family's own code interpolates the grid by cubic convolution and keeps the class token's embedding: transformers
without antialiasing (CLIP, SigLIP, DINOv2, ViT, BLIP-2), with it in DINOv2 with registers, and so does timm. It makes a
difference only to a smaller grid.
"""

from __future__ import annotations

import numpy as np

from jaxvlm.config import VisionConfig
from jaxvlm.models.resize import matrix
from jaxvlm.weights.plan import Leaf
from jaxvlm.weights.readers import Index


def resampled(leaf: Leaf, found: VisionConfig, wanted: VisionConfig, method: str) -> Leaf:
    """The leaf, [(1 +) old * old, D], for the grid of `wanted`; `method` is one of `models.resize`'s."""
    old, new = (c.image_size // c.patch_size for c in (found, wanted))
    special, width, weights = int(found.class_token), leaf.shape[-1], matrix(old, new, method)

    def read(index: Index) -> np.ndarray:
        table = leaf.read((slice(0, leaf.shape[0]), slice(0, width))).astype(np.float32)
        grid = table[special:].reshape(old, old, width)
        grid = np.einsum("ia,jb,abd->ijd", weights, weights, grid, optimize=True).reshape(new * new, width)
        return np.concatenate([table[:special], grid])[index]

    return Leaf(leaf.path, (new * new + special, width), read)
