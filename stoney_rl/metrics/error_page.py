"""errors.html: every answer with its class, to search and filter; one file that needs no network."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError
from stoney_rl.inspection import html
from stoney_rl.metrics.errors import CLASSES, HIT, MISS, NO_FORM, UNSCORED
from stoney_rl.metrics.retrieval import question_of

TEMPLATE = Path(__file__).with_name("error_page.html.jinja")


def write(
    path: str | Path, answers: Mapping[str, Sequence[dict]], errors: Mapping[str, Sequence[dict]], *, title: str
) -> Path:
    """Write ``render`` to ``path``, whole or not at all. Returns the path; raises ``StoneyError`` if it can't."""
    path = Path(path)
    page = render(answers, errors, title=title)
    try:
        checkpoints.write_text(path, page)
    except OSError as error:
        raise StoneyError(f"error page: can't write {path}: {error.strerror}; choose a folder that exists") from error
    return path


def render(answers: Mapping[str, Sequence[dict]], errors: Mapping[str, Sequence[dict]], *, title: str) -> str:
    """The page for the prediction rows of each system and their ``errors.classify``, systems in the order of ``answers``.

    Raises ``StoneyError`` if there is no system, or if the systems' rows or errors are not of the same ids in one order.
    """
    import jinja2
    from markupsafe import Markup

    _check(answers, errors)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        house_style=Markup(house_style()),
        rows=len(next(iter(answers.values()))),
        systems=list(answers),
        table=html._table,
        class_rows=_class_rows(errors),
        classes=list(CLASSES),
        data_json=html.script_json(_data(answers, errors)),
    )


def _check(answers, errors) -> None:
    if not answers:
        raise StoneyError("error page: no system; pass name -> prediction rows")
    first, *_ = answers
    ids = [row["id"] for row in answers[first]]
    for name in answers:
        for rows in (answers[name], errors.get(name, ())):
            if [row["id"] for row in rows] != ids:
                raise StoneyError(
                    f"error page: the rows or errors of {name!r} are not those of {first!r} in the same order; "
                    "evaluate both on one split"
                )


def house_style() -> str:
    """The style sheet of the inspection's page, which is the look of this project's pages."""
    return re.search(r"<style>\n(.*?)</style>", html.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)[1]


def _class_rows(errors: Mapping[str, Sequence[dict]]) -> list[dict]:
    """A line for each class and status that occurs: its misses by system, and what it means."""

    def line(label: str, key: str, meaning: str) -> dict:
        numbers = {name: sum(error[key] == label for error in found) for name, found in errors.items()}
        return {"answer": label} | numbers | {"what it is": meaning}

    lines = [line(HIT, "status", "the answer has every form it was asked for")]
    lines += [line(label, "class", meaning) for label, meaning in CLASSES.items()]
    lines.append(line(NO_FORM, "status", "the row asks for a meaning or something else; it has no class"))
    lines.append(line(UNSCORED, "status", "there is no prediction"))
    return [one for one in lines if any(one[name] for name in errors)]


def _data(answers: Mapping[str, Sequence[dict]], errors: Mapping[str, Sequence[dict]]) -> dict:
    """What the page's script reads: each row once, and each system's answer to it as a list, to keep the file small."""
    first, *_ = answers
    return {
        "systems": list(answers),
        "rows": [
            {
                "id": str(row["id"]),
                "asked": question_of(row["prompt"]),
                "expected": row["reference"],
                **{key: error[key] for key in ("seen", "pos", "kind")},
            }
            for row, error in zip(answers[first], errors[first], strict=True)
        ],
        "answers": [
            [
                {
                    "text": row["prediction"],
                    "label": error["class"] if error["status"] == MISS else error["status"],
                    **{key: error[key] for key in ("wanted", "given") if error[key]},
                    **({"near": error["nearest"]} if error["nearest"] else {}),
                }
                for row, error in zip(answers[name], errors[name], strict=True)
            ]
            for name in answers
        ],
    }
