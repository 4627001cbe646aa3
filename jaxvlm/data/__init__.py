"""From data sets to batches of arrays: numpy, PIL, grain and tokenizers only, never jax or torch.

`sources` read records, `conversation` renders and labels them, `image` decodes and resizes, `layout` places
the visual tokens, `packing` fills rows, `loader` puts them together. Submodules are imported by name; this
file imports none, so that inference does not pay for grain.
"""

from jaxvlm.config import UserError


class DataError(UserError):
    """Data that cannot be used; the message names the file or record and the fix."""
