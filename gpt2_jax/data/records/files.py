"""The files of a source of records, and their rows and examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridge.errors import quoted
from gpt2_jax.data.compression import open_stream
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import is_dataset_id, record_format
from gpt2_jax.data.records import arrow_records, csv_records, hub_datasets, json_records, saved_datasets
from gpt2_jax.data.records.examples import EMPTY_TEXT, Example, example_of, texts_in
from gpt2_jax.data.records.rows import BadRecord, Row
from gpt2_jax.data.records.schema import RecordOptions, Schema, choose_schema
from gpt2_jax.data.text.documents import Document, Documents, find_files

_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_SPLIT = re.compile(rf"(?:^|[_.-])({'|'.join(_SPLITS)})(?=[_.-])")


@dataclass(frozen=True)
class Records:
    """Files of records with one schema, in the order in which they are trained on."""

    source: str
    files: tuple[Document, ...]
    schema: Schema
    options: RecordOptions = field(default_factory=RecordOptions)

    @classmethod
    def of(cls, found: Documents, options: RecordOptions) -> Records:
        """Return the records of these files. Raises `DataError` if no schema fits the first record."""
        return cls(found.source, found.files, _schema(found, options), options)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def key(self) -> str:
        """Part of the key of caches made from these records."""
        return f" {self.schema.key} {self.options.skip_bad}"

    def texts(self) -> Iterator[tuple[str, int]]:
        """Yield the texts of all examples, each with the number of bytes of the files that were read so far."""
        before = 0
        for file in self.files:
            for row in rows_of(file.path, self.schema):
                if (example := self.example(file, row)) is not None:
                    yield from ((text, before + row.position) for text in texts_in(example))
            before += file.size

    def example(self, file: Document, row: Row) -> Example | None:
        """Return the example in a row, or None if the row is left out."""
        try:
            return example_of(row, self.schema)
        except BadRecord as bad:
            self.leave_out(row.place_in(file.path), bad)
            return None

    def leave_out(self, where: str, bad: BadRecord) -> None:
        """Raise `DataError` for a record that cannot be used, unless such records are left out.

        `where`: the file and the line, for the message.
        """
        if bad.reason != EMPTY_TEXT and not self.options.skip_bad:
            raise _bad_record_error(where, bad) from None


@dataclass(frozen=True)
class RecordSource:
    """The records of one source."""

    train: Records
    validation: Records | None
    """None if the source has no split of its own."""


def find_records(source: str | Path, options: RecordOptions) -> RecordSource | None:
    """Return the records of a file, a directory, a glob, a directory of `datasets` or a data set of the hub.

    None if the source is text.

    Files with val, valid or validation in their names are the validation data if others are not, and then files with
    test in their names are not used. Without them, files with test in their names are the validation data.

    Raises:
        DataError: there is no file, text and records are mixed, or no schema fits.
    """
    if is_dataset_id(source):
        train, validation = hub_datasets.find_splits(str(source))
    elif saved_datasets.is_saved_dataset(Path(source)):
        train, validation = saved_datasets.find_splits(Path(source))
    else:
        found = find_files(source)
        kinds = [record_format(file.path) for file in found.files]
        if not any(kinds):
            return None
        _require_records_only(found)
        train, validation = _split_by_name(found)
    records = Records.of(train, options)
    return RecordSource(records, None if validation is None else Records.of(validation, options))


def rows_of(path: Path, schema: Schema) -> Iterator[Row]:
    """Yield the rows of a file. Raises `DataError` if the file is damaged or its columns do not fit the schema."""
    format = record_format(path)
    if format in ("parquet", "arrow"):
        _require_columns(arrow_records.columns_of(path, format), schema, path)
        yield from arrow_records.rows(path, format, schema.kind, schema.fields)
        return
    with open_stream(path) as stream:
        if format in ("csv", "tsv"):
            yield from csv_records.rows(path, stream, format, lambda columns: _require_columns(columns, schema, path))
        elif format == "json" and json_records.is_array(stream):
            yield from json_records.rows_of_array(path, stream)
        else:
            yield from json_records.rows_of_lines(path, stream)


def _require_columns(columns: Sequence[str], schema: Schema, path: Path) -> None:
    if missing := [name for name in schema.fields if name not in columns]:
        raise DataError(
            f"{quoted(path)} has no column {quoted(missing[0])}, which other files of the data have; its columns are "
            f"{', '.join(map(quoted, columns[:20]))}"
        )


def _schema(found: Documents, options: RecordOptions) -> Schema:
    """Return the schema that fits the first record."""
    for file in found.files:
        if (columns := _columns(file.path, options)) is not None:
            schema = choose_schema(columns, options, quoted(file.path))
            if schema.kind == "messages":
                _require_lists(found)
            return schema
    raise DataError(f"{quoted(Path(found.source))} has no records")


def _require_lists(found: Documents) -> None:
    """Raise `DataError` for files whose fields cannot be lists of messages."""
    if table := next((file.path for file in found.files if record_format(file.path) in ("csv", "tsv")), None):
        raise DataError(f"{quoted(table)}: CSV and TSV cannot hold messages; write the records as JSON lines")


def _columns(path: Path, options: RecordOptions) -> list[str] | None:
    """Return the names of the fields of a file's first record, or None if the file has no record."""
    format = record_format(path)
    if format in ("parquet", "arrow"):
        return arrow_records.columns_of(path, format)
    with open_stream(path) as stream:
        if format in ("csv", "tsv"):
            return csv_records.header(path, stream, format) or None
        read = json_records.rows_of_array if format == "json" and json_records.is_array(stream) else None
        for row in (read or json_records.rows_of_lines)(path, stream):
            if not isinstance(row.values, BadRecord):
                return list(row.values)
            if not options.skip_bad:
                raise _bad_record_error(row.place_in(path), row.values)
    return None


def _bad_record_error(where: str, bad: BadRecord) -> DataError:
    return DataError(f"{where}: {bad}; {bad.remedy}, or leave out and count such records with --skip-bad-records")


def _require_records_only(found: Documents) -> None:
    """Raise `DataError` for a mixture of records and text, and for files that belong to a directory of `datasets`."""
    for directory in {file.path.parent for file in found.files}:
        if saved_datasets.is_saved_dataset(directory):
            raise DataError(
                f"{quoted(Path(found.source))} contains a saved data set; give its directory, {quoted(directory)}"
            )
    texts = [file.path for file in found.files if record_format(file.path) is None]
    if texts:
        records = next(file.path for file in found.files if record_format(file.path))
        raise DataError(
            f"{quoted(Path(found.source))} has both records, such as {quoted(records.name)}, and text, such as "
            f"{quoted(texts[0].name)}; name the files of one kind with a glob, such as 'DIRECTORY/**/*"
            f"{quoted(''.join(records.suffixes[-2:]))[1:]}"
        )


def _split_by_name(found: Documents) -> tuple[Documents, Documents | None]:
    """Return the files for training and for validation; the second is None if the names do not tell them apart."""
    named: dict[str, list[Document]] = {"train": [], "validation": [], "test": [], "": []}
    for file in found.files:
        names = _SPLIT.findall(file.path.name.lower())
        named[_SPLITS[names[-1]] if names else ""].append(file)
    training, held_out = named["train"] or named[""], named["validation"] or named["test"]
    if training and held_out:
        return Documents(found.source, tuple(training)), Documents(found.source, tuple(held_out))
    return found, None
