"""Keeps the errors that the parity tests measure, for the table in the documentation."""

import json
import os


def record_parity(family: str, part: str, error: float) -> None:
    """Appends one measurement to the JSON-lines file named by JAXVLM_PARITY_LOG; without it, does nothing.

    `error` is the largest absolute error over the largest magnitude of the reference.
    """
    path = os.environ.get("JAXVLM_PARITY_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"family": family, "part": part, "error": float(error)}) + "\n")
