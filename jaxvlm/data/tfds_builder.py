"""Any source as a TFDS data set of array_record files, for tools that read those; it is read back as a source too.

    from jaxvlm.data.tfds_builder import prepare
    prepare(open_source(SourceConfig(path="llava.json", images="images")), "~/tensorflow_datasets", name="llava_mix")

Needs tensorflow-datasets (`pip install jaxvlm[data]`), which writes array_record without TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from jaxvlm.data import DataError
from jaxvlm.data.conversation import record_images
from jaxvlm.data.sources import Source


def prepare(source: Source, data_dir: str | os.PathLike, name: str = "llava", version: str = "1.0.0") -> str:
    """Writes the split 'train' of DATA_DIR/NAME/VERSION, in the source's order, and returns that folder.

    The features are `id` (Text), `images` (Sequence of Image, the files' own bytes) and `conversations` (Sequence of {`from`,
    `value`}). Raises `DataError` for records that have none, and if the folder is there already.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"TFDS is not installed: pip install jaxvlm[data] ({error}).") from error
    text = tfds.features.Text()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None  # where checksums of downloads would be; TFDS looks with a package that it does not require

        def _info(self):
            turns = {"from": text, "value": text}
            features = {
                "id": text,
                "images": tfds.features.Sequence(tfds.features.Image()),
                "conversations": tfds.features.Sequence(turns),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from _examples(source)

    Builder.name = name
    builder = Builder(data_dir=Path(data_dir).expanduser(), file_format="array_record")
    if builder.data_path.exists():
        raise DataError(f"{builder.data_dir} exists already; remove it, or choose another name or version.")
    builder.download_and_prepare()
    return str(builder.data_dir)


def _examples(source: Source) -> Iterator[tuple[int, dict]]:
    for i in range(len(source)):
        record = source[i]
        turns = record.get("conversations")
        if not isinstance(turns, list):
            raise DataError(f"{source.path}, record number {i} (id {record.get('id')!r}) has no conversations.")
        images = [source.image(name) for name in record_images(record)]
        yield (
            i,
            {
                "id": str(record.get("id", i)),
                "images": [BytesIO(image) if isinstance(image, bytes) else image for image in images],
                "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in turns],
            },
        )
