"""Checkpoints of other projects in and out: readers, one rule table per family, a streamed strict import, an export."""

from jaxvlm.weights.configs import config_from, prompt_from
from jaxvlm.weights.exporter import export
from jaxvlm.weights.importer import import_model, import_part, load_any
from jaxvlm.weights.plan import ImportReport
from jaxvlm.weights.readers import TensorSource, WeightsError, open_source

__all__ = [
    "ImportReport",
    "TensorSource",
    "WeightsError",
    "config_from",
    "export",
    "import_model",
    "import_part",
    "load_any",
    "open_source",
    "prompt_from",
]
