"""Source files for the tests of data, and what is in a folder."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: list[Any], **how: Any) -> str:
    """Write rows by the name's ending; a string is a line as it is. `how`: of write_table."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, **how)
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row of messages; `more` goes into the assistant's."""
    assistant = {"role": "assistant", "content": answer, **more}
    return {"messages": [{"role": "user", "content": question}, assistant]}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
