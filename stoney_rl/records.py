"""Files of JSON lines that a run adds to while it works, and finds again after a kill."""

import json
from collections.abc import Iterable
from pathlib import Path


def append(path: Path, records: Iterable[dict]) -> None:
    """Add a line for each record."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in records)


def read(path: Path) -> list[dict]:
    """The whole lines; [] if there is no file. A last line that a kill cut short is cut off the file too.

    Raises ``ValueError`` for a file that holds anything else.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    # Not splitlines(): a text may hold U+2028 or U+0085, which JSON leaves as they are.
    return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]


def keep_steps(path: Path, last: int) -> list[dict]:
    """Drop the lines whose ``step`` is after ``last``: a run that resumes trains those steps again. Returns the rest."""
    kept = [line for line in read(path) if line["step"] <= last]
    if path.exists():
        path.write_text("", encoding="utf-8")
        append(path, kept)
    return kept
