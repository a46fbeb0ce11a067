"""Records written in every format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows: Rows, delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([*rows]), out, row_group_size=3)
    return out.getvalue()


def arrow(rows: Rows, *, stream: bool) -> bytes:
    import pyarrow

    table, out = pyarrow.Table.from_pylist([*rows]), io.BytesIO()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table, 4)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, codec="zstd", asbytes=True)


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "lines.json": json_lines,
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "a.csv": lambda rows: separated(rows, ","),
    "a.tsv": lambda rows: separated(rows, "\t"),
    "a.parquet": parquet,
    "stream.arrow": lambda rows: arrow(rows, stream=True),
    "file.arrow": lambda rows: arrow(rows, stream=False),
    "a.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "array.json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
    "a.csv.zst": lambda rows: zstd(separated(rows, ",")),
}


def write(directory: Path, name: str, rows: Rows) -> Path:
    """Write records in the format of a name."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(WRITERS[name](rows))
    return directory / name


def write_saved_dataset(directory: Path, rows: Rows) -> Path:
    """Write the files of `Dataset.save_to_disk`."""
    directory.mkdir(parents=True)
    (directory / "data-00000-of-00001.arrow").write_bytes(arrow(rows, stream=True))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return directory
