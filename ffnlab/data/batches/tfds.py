"""TensorFlow Datasets without TensorFlow: prepared datasets as records by index."""

from pathlib import Path

from ffnlab.data.batches.records import Source
from ffnlab.errors import FFNLabError, require

__all__ = ["tfds_records"]

INFO = "dataset_info.json"


def tfds_records(
    dataset: str | Path, split: str = "train", *, data_dir: str | Path | None = None
) -> Source:
    """A split of a prepared dataset, read with `tfds.data_source`.

    Args:
      dataset: the folder of one version of a dataset (with dataset_info.json), or a name that TFDS
        knows, "mnist" or "mnist:3.0.1", prepared in `data_dir`.
      split: any split expression of TFDS, "train" or "train[:80%]".
      data_dir: where datasets lie, TFDS's own folder when None; with a name only.
    Returns:
      records by index: trees of NumPy arrays by feature.
    Raises:
      FFNLabError: there is no such dataset or split, it is not prepared, or its files are not
        array_record, the only format that can be read by index.
      MissingExtraError: tensorflow-datasets is not installed.
    """
    tfds = require("tensorflow_datasets", extra="data")
    folder = Path(dataset)
    if isinstance(dataset, Path) or folder.is_dir():
        if not (folder / INFO).is_file():
            raise FFNLabError(f"{folder} is no prepared TFDS dataset: there is no {INFO}")
        builder = tfds.builder_from_directory(folder)
    else:
        try:
            builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            raise FFNLabError(f"dataset={str(dataset)!r} is unknown to TFDS: {error}") from None
    if not builder.is_prepared():
        raise FFNLabError(
            f"dataset {builder.info.full_name} is not prepared in {builder.data_path}; run "
            f"`tfds build {builder.name} --file_format=array_record` (builders may need TensorFlow)"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise FFNLabError(
            f"{builder.data_path} holds {builder.info.file_format.value} files; only array_record "
            "can be read by index: `tfds convert_format --out_file_format=array_record`"
        )
    try:
        return builder.as_data_source(split=split)
    except (ValueError, KeyError) as error:
        splits = ", ".join(map(repr, builder.info.splits))
        raise FFNLabError(
            f"split={split!r} of {builder.info.full_name}: {error}; there are {splits}"
        ) from error
