"""Pictures of the numbers: files that are there whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: "Figure", path: str | Path) -> Path:
    """Write ``figure`` as a PNG, the same bytes for the same figure. Raises ``StoneyError`` if it can't be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        raise StoneyError(f"plot: can't write {path}: {error.strerror}; choose a folder that exists") from error
    return path
