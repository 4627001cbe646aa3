"""What to do about images that are not there: where they come from, and where else they may lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

# The folders of LLaVA's published files, as its README lays them out: what to fetch (recipes §2.1).
FOLDERS = {
    "coco/train2017": "COCO's train2017.zip (118,287 images, 18 GB), unpacked in {images}/coco",
    "gqa/images": "GQA's images.zip (20 GB), unpacked in {images}/gqa",
    "ocr_vqa/images": (
        "OCR-VQA's images, every file saved as .jpg. Its download script follows links of which many are dead: take a "
        "complete copy from the Hugging Face Hub, or train without these records"
    ),
    "textvqa/train_images": "TextVQA's train_val_images.zip (7 GB), unpacked in {images}/textvqa",
    "vg/VG_100K": "Visual Genome's first part, images.zip (9 GB), unpacked in {images}/vg",
    "vg/VG_100K_2": "Visual Genome's second part, images2.zip (5 GB), unpacked in {images}/vg",
}
ENDINGS = [form(end) for end in (".jpg", ".jpeg", ".png", ".gif", ".webp") for form in (str.lower, str.upper)]
TWINS = {"vg/VG_100K": "vg/VG_100K_2", "vg/VG_100K_2": "vg/VG_100K"}


def by_folder(names: Sequence[str]) -> dict[str, list[str]]:
    """Image names by the folder they are in, the fullest first."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(name)
    return dict(sorted(folders.items(), key=lambda item: -len(item[1])))


def missing_advice(images: str, folder: str, names: Sequence[str]) -> list[str]:
    """How to come by the missing images `names` of `folder`, a folder of `images`: one sentence a line."""
    root, home = Path(images), Path(images, folder)
    if not root.is_dir():
        return [f"There is no folder {images}: --images (a source's `images`) is what the image names are relative to."]
    there = None if home.is_dir() else _elsewhere(root, folder)
    if there:
        return [f"It lies in {there}: mkdir -p '{home.parent}' && ln -s '{there.resolve()}' '{home}'"]
    found, advice = _in_twin(root, folder, names)
    renamed, more = _other_type(root, [name for name in names if name not in found])
    left = len(names) - len(found) - renamed
    what = FOLDERS.get(folder, "").format(images=images) or f"them again into {home}"
    if left:
        advice += [] if home.is_dir() else [f"There is no folder {home}.{_packed(root, folder)}"]
        advice.append(f"Fetch {what}." if left == len(names) else f"For the other {left:,}: fetch {what}.")
    return more + advice


def _elsewhere(root: Path, folder: str) -> Path | None:
    """Where a folder that is not in its place is found: unpacked a level too high or too low."""
    parts = PurePosixPath(folder).parts
    places = [PurePosixPath(*parts[i:]) for i in range(1, len(parts))]
    candidates = [root / place for place in places] + [root.parent / folder, root / root.name / folder]
    return next((path for path in candidates if path.is_dir()), None)


def _packed(root: Path, folder: str) -> str:
    """Archives that may hold the folder."""
    above = {root, (root / folder).parent}
    files = sorted(
        file for place in above for end in ("zip", "tar*") for file in place.glob(f"*.{end}") if file.is_file()
    )
    return f" {', '.join(map(str, files[:3]))} may hold it, not unpacked yet." if files else ""


def _in_twin(root: Path, folder: str, names: Sequence[str]) -> tuple[set[str], list[str]]:
    """Visual Genome's two parts are mixed up easily: the names that lie in the other one, and how to show them here."""
    twin = TWINS.get(folder)
    found = {name for name in names if twin and (root / twin / PurePosixPath(name).name).is_file()}
    if not found:
        return found, []
    other, home = PurePosixPath(twin).name, root / folder
    link = f"cd '{home}' && ln -s ../{other}/*.jpg ." if home.is_dir() else f"ln -s {other} '{home}'"
    return found, [f"In {twin}: {len(found):,} of {len(names):,}, as both parts were unpacked in one folder. {link}"]


def _other_type(root: Path, names: Sequence[str]) -> tuple[int, list[str]]:
    """Files whose name ends otherwise than the record says: the type is read from the content, so a name is enough."""
    found = Counter()
    for path in map(PurePosixPath, names):
        others = (end for end in ENDINGS if end != path.suffix and (root / path.with_suffix(end)).is_file())
        found[next(others, None)] += 1
    del found[None]
    hint = "Rename them as in the records: the type is read from the content."
    return found.total(), [f"There as *{end}: {count:,} of {len(names):,}. {hint}" for end, count in found.items()]
