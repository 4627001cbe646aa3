"""What to do about images that are not there: where they come from, and where else they may lie."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Folder(NamedTuple):
    """A folder of LLaVA's published files: how many images a complete one has (LLaVA #702), and what to fetch."""

    files: int
    fetch: str


# As LLaVA's README lays them out (recipes §2.1).
FOLDERS = {
    "coco/train2017": Folder(118_287, "COCO's train2017.zip (18 GB), unpacked in {images}/coco"),
    "gqa/images": Folder(148_854, "GQA's images.zip (20 GB), unpacked in {images}/gqa"),
    "ocr_vqa/images": Folder(
        207_572,
        "OCR-VQA's images, every file named .jpg. The links that its download script follows are dead in part: take a "
        "complete copy, such as weizhiwang/llava_v15_instruction_images on the Hugging Face Hub (LLaVA #1458)",
    ),
    "textvqa/train_images": Folder(25_119, "TextVQA's train_val_images.zip (7 GB), unpacked in {images}/textvqa"),
    "vg/VG_100K": Folder(64_346, "Visual Genome's first part, images.zip (9 GB), unpacked in {images}/vg"),
    "vg/VG_100K_2": Folder(43_903, "Visual Genome's second part, images2.zip (5 GB), unpacked in {images}/vg"),
}
ENDINGS = [form(end) for end in (".jpg", ".jpeg", ".png", ".gif", ".webp") for form in (str.lower, str.upper)]
TWINS = {"vg/VG_100K": "vg/VG_100K_2", "vg/VG_100K_2": "vg/VG_100K"}


def by_folder(names: Sequence[str]) -> dict[str, list[str]]:
    """Image names by the folder they are in, the fullest first."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(str(PurePosixPath(name).parent), []).append(name)
    return dict(sorted(folders.items(), key=lambda item: -len(item[1])))


def images_folder(images: str, path: str, names: Sequence[str]) -> list[str]:
    """What to do if every image is missing, as where `images` is a wrong folder; [] if that is not the reason."""
    beside = [Path(path).absolute().parent, Path(path).absolute().parent.parent]
    places = [place for above in beside for place in (above, above / "images", above / "data")]
    right = next((place for place in places if any((place / name).is_file() for name in names[:100])), None)
    if right:
        return [f"They lie in {right}: give --images {right} (in a config the source's `images`)."]
    if not Path(images).is_dir():
        return [f"There is no folder {images}; --images (a source's `images`) is what the image names are relative to."]
    return []


def missing_advice(images: str, folder: str, names: Sequence[str]) -> list[str]:
    """How to come by the missing images `names` of `folder`, a folder of `images`: one sentence a line."""
    root, home = Path(images), Path(images, folder)
    there = None if home.is_dir() else _elsewhere(root, folder)
    if there:
        return [f"It lies in {there}: mkdir -p '{home.parent}' && ln -s '{there.resolve()}' '{home}'"]
    found, advice = _in_twin(root, folder, names)
    renamed, more = _other_type(root, [name for name in names if name not in found])
    left = len(names) - len(found) - renamed
    if left:
        advice += [_holds(root, folder)]
        advice.append(
            f"Fetch {what_to_fetch(images, folder)}." + f" That is for {left:,} of them." * (left < len(names))
        )
    return more + [line for line in advice if line]


def what_to_fetch(images: str, folder: str) -> str:
    """Where the images of a folder come from."""
    return (
        FOLDERS[folder].fetch.format(images=images) if folder in FOLDERS else f"them again into {Path(images, folder)}"
    )


def _holds(root: Path, folder: str) -> str:
    home = root / folder
    if not home.is_dir():
        return f"There is no folder {home}.{_packed(root, folder)}"
    if folder not in FOLDERS:
        return ""
    return f"The folder holds {sum(1 for _ in os.scandir(home)):,} files; a complete one has {FOLDERS[folder].files:,}."


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
    other, home = (root / twin).resolve(), root / folder
    link = f"cp -rsn '{other}/.' '{home}'" if home.is_dir() else f"ln -s '{other}' '{home}'"
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
