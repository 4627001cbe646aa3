"""Writes docs/models.md: every family in the registry, what can be done with it, and the error that the tests measured.

    make models        # runs the parity tests, keeps their measurements in docs/parity.jsonl, and runs this

What is importable is read off the registry, what is exportable is asked of the exporter, and an error is the largest
absolute difference to the reference over the reference's largest magnitude, in float32, on tiny random models.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jaxvlm.config import ConnectorConfig, ModelConfig, PromptConfig, UserError
from jaxvlm.weights.configs import FORMATS
from jaxvlm.weights.exporter import TARGETS
from jaxvlm.weights.families import BY_MODEL_TYPE, FAMILIES

DOCS = Path(__file__).resolve().parent
# What the tests call a family, where that is not its model_type in a config.json.
MEASURED_AS = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2_with_registers": "dinov2-registers",
    "blip_2_vision_model": "eva-clip",
    "instructblip_vision_model": "eva-clip",
    "gemma3_text": "gemma3",
    "phi": "phi2",
}
HEADING = """# Models

Written by `make models` from the registry in `jaxvlm/weights/families/` and from what the parity tests measured; do not edit.

*Error* is the largest absolute difference to the reference divided by the reference's largest magnitude, in float32, on a tiny
random model with every parameter drawn anew. The tests allow 2e-5. The reference is transformers; for what it does not have (timm's
names, several towers, S2, the resampler, SVA, Prismatic, Cambrian, LLaVA's own form) it is torch code written in the test from the
papers and the published checkpoints' layout. Real checkpoints of these families were not at hand: nothing here says that a
benchmark score was reproduced. GGUF and EfficientNet are compared with other readers of the same files instead.

Every tower, connector and decoder trains, alone or together: all are the same parameters under the same step. Checkpoints come as
safetensors, torch files (read without torch and without running their pickles) or GGUF where that is said. *Export* names the forms
in which a LLaVA with this part can be written (`jaxvlm export --format`).
"""


def main() -> None:
    (DOCS / "models.md").write_text(page(measured()), encoding="utf-8")
    print(f"Written: {DOCS / 'models.md'}")


def measured() -> dict[tuple[str, str], float]:
    """{(family, part): the largest error measured}."""
    errors: dict[tuple[str, str], float] = {}
    for line in (DOCS / "parity.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        key = entry["family"], entry["part"]
        errors[key] = max(errors.get(key, 0.0), entry["error"])
    return errors


def page(errors: dict[tuple[str, str], float]) -> str:
    sections = [HEADING]
    for part, title in (("vision", "Vision towers"), ("llm", "Language models")):
        rows = [
            (f"`{kind}`", family.name, exports(part, family, kind), show(errors, MEASURED_AS.get(kind, kind), part))
            for kind, family in BY_MODEL_TYPE.items()
            if family.part == part and not kind.startswith("timm")
        ]
        sections.append(table(title, ("model_type", "table", "export", "error"), rows))
        others = [
            family
            for family in FAMILIES.values()
            if family.part == part and (not family.model_types or family.name.startswith("timm"))
        ]
        rows = [(f"`{family.name}`", show(errors, family.name.replace("-", "_"), part)) for family in others]
        listed = {MEASURED_AS.get(kind, kind) for kind in BY_MODEL_TYPE} | {
            family.name.replace("-", "_") for family in others
        }
        rows += [(f"{name}", show(errors, name, of)) for name, of in errors if of == part and name not in listed]
        sections.append(table("", ("read by other names, or more of the above", "error"), rows))
    rows = [(name, show(errors, name, "connector")) for name, part in errors if part == "connector"]
    sections.append(table("Connectors", ("kind", "error"), rows))
    rows = [(name, show(errors, name, part)) for name, part in errors if part in ("logits", "hidden")]
    sections.append(table("Whole models", ("read from its checkpoint", "error of its logits"), rows))
    rows = [(name, show(errors, name, part)) for name, part in errors if part == "export"]
    sections.append(table("", ("written, and opened by transformers", "error of its logits"), rows))
    listed = ", ".join(f"`{form.name}`" for form in FORMATS)
    sections.append(
        f"Formats of whole models, recognised by content: {listed}, a jaxvlm run, and PEFT adapters on any of them.\n"
    )
    return "\n".join(sections)


def table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"## {title}\n"] if title else []
    lines += [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def show(errors: dict[tuple[str, str], float], name: str, part: str) -> str:
    error = errors.get((name, part))
    return "not measured" if error is None else f"{error:.1e}"


def exports(part: str, family, kind: str) -> str:
    """The forms that can hold an otherwise plain LLaVA with this family's default tower or decoder."""
    config = family.configure({"model_type": kind}, Path("nowhere"))
    if part == "vision":
        model = ModelConfig(vision=dataclasses.replace(config, feature_layers=(-2,), feature_norm=False))
    else:
        model = ModelConfig(llm=config)
    tiled = dataclasses.replace(model, connector=ConnectorConfig(row_end=True))
    cases = {"llava-next-hf": (tiled, PromptConfig(transform="anyres"))}
    found = []
    for name, target in TARGETS.items():
        try:
            if not target.reasons(*cases.get(name, (model, PromptConfig()))):
                found.append(name)
        except UserError:
            pass
    return ", ".join(found) or "no form holds it"


if __name__ == "__main__":
    main()
