"""MMBench dev, in English and in Chinese: lettered options, asked in every rotation."""

import base64
import csv
import functools
import io
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax.eval.answers import AnswerRecord, by_id, pair
from stf_jax.eval.benchmark import Benchmark, Paths, Score
from stf_jax.eval.files import check_fields
from stf_jax.eval.questions import OPTION_LETTER, Decoding, Question, image_prompt
from stf_jax.util.files import name_some, read_text, write_whole

_LETTERS = "ABCD"
_ROTATION = 1_000_000
_NEEDED = ("index", "question", "hint", "image", *_LETTERS)
_OPTIONAL = ("answer", "category", "l2-category", "source", "split", "comment")

# The server's table: these columns go, and the answer stands at this place.
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_AT = 6

# What the reference's table reader takes for an empty cell.
_EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"} | {
    *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
}
# A bare letter, or one with a mark behind it; "A dog" names no option.
_LETTER = re.compile(r"\(?([A-D])(?:[.):,]|$)")
# In the place of an image: the index of the row that has it. No image's base64 is as short.
_POINTER = re.compile(r"\d{1,20}")

_LOCAL = "the circular accuracy by letters; the server has a language model read other answers"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of the TSV; `index` is a number, an empty cell None."""
    # An image in base64 is longer than csv's default limit for a cell.
    csv.field_size_limit(sys.maxsize)
    text = read_text(path)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), dialect="excel-tab", restval=""))
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as TSV ({error}); fetch it again") from error
    if not rows:
        raise ValueError(f"{path}: empty; fetch it again")
    check_fields(path, [("the header", rows[0])], _NEEDED)
    for number, row in enumerate(rows, start=1):
        if None in row or not row["index"].isdecimal():
            raise ValueError(
                f"{path}: row {number} has too many columns or an index that is no number "
                f"({row['index']!r:.40}); fetch it again"
            )
    return [
        {name: None if cell in _EMPTY else cell for name, cell in row.items()}
        | {"index": int(row["index"])}
        for row in rows
    ]


def _is_absent(cell: str | None) -> bool:
    return cell is None or cell.lower() in ("nan", "none")


def _read(paths: Paths, *, ending: str) -> list[Question]:
    path = paths["questions"]
    rows = _rows(path)
    images = {str(row["index"]): row["image"] for row in rows}
    return [_question(path, n, row, images, ending) for n, row in enumerate(rows)]


def _question(
    path: Path,
    number: int,
    row: dict[str, Any],
    images: Mapping[str, str | None],
    ending: str,
) -> Question:
    options: list[str] = []
    for letter in _LETTERS:
        if _is_absent(row[letter]):
            break
        options.append(row[letter])
    if row["question"] is None or row["image"] is None:
        raise ValueError(f"{path}: index {row['index']} has no question or image; fetch it again")
    lines = [] if _is_absent(row["hint"]) else [row["hint"]]
    lines += [row["question"], *(f"{a}. {b}" for a, b in zip(_LETTERS, options, strict=False))]
    text = "\n".join(lines)
    cell = row["image"]
    if _POINTER.fullmatch(cell):
        # Rotations of a question may name the row that holds their image.
        named, cell = cell, images.get(cell)
        if cell is None or _POINTER.fullmatch(cell):
            raise ValueError(
                f"{path}: the image of index {row['index']} is that of index {named}, which "
                "has none itself; fetch it again"
            )
    try:
        image = base64.b64decode(cell, validate=True)
    except ValueError as error:
        raise ValueError(
            f"{path}: the image of index {row['index']} is no base64 ({error}); fetch it again"
        ) from error
    return Question(
        number=number,
        question_id=row["index"],
        text=text,
        prompt=image_prompt(f"{text}\n{ending}"),
        images=(image,),
        extra={
            "round_id": 0,
            "options": options,
            "option_char": list(_LETTERS[: len(options)]),
        },
    )


def parse_letter(text: str) -> str | None:
    """The option that an answer names: "B", "B.", "(B)", "B. a dog"; None if none."""
    match = _LETTER.match(text.strip())
    return match[1] if match else None


def _score(paths: Paths, answers: Sequence[AnswerRecord], answered_only: bool) -> Score:
    rows = _rows(paths["questions"])
    _check_columns(paths["questions"], rows[0])
    truth = {str(row["index"]): row.get("answer") for row in rows}
    odd = [
        f"{index} ({answer})" for index, answer in truth.items() if answer not in tuple(_LETTERS)
    ]
    # The test split keeps its answers on the server, all of them.
    if odd and any(truth.values()):
        raise ValueError(
            f"{paths['questions']}: no letter of {_LETTERS} is the answer of index "
            f"{name_some(odd)}; fetch it again"
        )
    paired = pair(list(truth), answers, key=by_id, answered_only=answered_only)
    questions = len(paired.answers) + len(paired.missing)
    unread = sum(parse_letter(answer.text) is None for _, answer in paired.answers)
    figures: dict[str, Any] = {"answers_without_letter": unread}
    headline = None
    if all(truth.values()):
        right = dict.fromkeys(paired.missing, False)
        right |= {
            index: parse_letter(answer.text) == truth[index] for index, answer in paired.answers
        }
        rotations: dict[int, list[bool]] = defaultdict(list)
        for index, correct in right.items():
            rotations[int(index) % _ROTATION].append(correct)
        headline = 100 * sum(map(all, rotations.values())) / len(rotations)
        figures |= {
            "accuracy": 100 * sum(right.values()) / len(right),
            "circular_accuracy": headline,
            "circular_questions": len(rotations),
        }
    return Score(
        figures=figures,
        headline=headline,
        questions=questions,
        missing=paired.missing,
        note=_LOCAL if headline is not None else "",
    )


def _check_columns(path: Path, columns: Collection[str]) -> None:
    """Raises ValueError if answers may be there under a wrong name; the test split has none."""
    strange = [column for column in columns if column not in (*_NEEDED, *_OPTIONAL)]
    if strange and "answer" not in columns:
        raise ValueError(
            f"{path}: the header has no answer and an unknown {', '.join(map(repr, strange))}; "
            "write answer if that is what it holds, or else leave it out (known are "
            f"{', '.join((*_NEEDED, *_OPTIONAL))})"
        )


def _submit(paths: Paths, answers: Sequence[AnswerRecord], folder: Path, *, name: str) -> Path:
    """The server's spreadsheet: the official table with the answers in it and images left out."""
    # Importing it takes a moment that other benchmarks need not wait for.
    from openpyxl import Workbook  # type: ignore[import-untyped]
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE  # type: ignore[import-untyped]

    rows = _rows(paths["questions"])
    texts = {by_id(answer): answer.text for answer in answers}
    columns = [column for column in rows[0] if column not in _DROPPED]
    columns.insert(_AT, "prediction")
    book = Workbook()
    sheet = book.active
    sheet.append(columns)
    for number, row in enumerate(rows, start=2):
        row["prediction"] = texts[str(row["index"])]
        for place, column in enumerate(columns, start=1):
            cell = sheet.cell(number, place)
            value = row[column]
            if isinstance(value, str):
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)
                # Text stays text where it begins with "=".
                cell.data_type = "s"
            else:
                cell.value = value
    out = folder / f"{name}.xlsx"
    with write_whole(out) as unfinished:
        book.save(unfinished)
    return out


def _mmbench(name: str, title: str, split: str, ending: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        paths={"questions": f"mmbench/{split}.tsv"},
        to_ask=("questions",),
        to_score=("questions",),
        decoding=Decoding(max_new_tokens=1024),
        read=functools.partial(_read, ending=ending),
        score=_score,
        submit=functools.partial(_submit, name=split),
    )


MMBENCH = _mmbench("mmbench", "MMB", "mmbench_dev_20230712", OPTION_LETTER)
MMBENCH_CN = _mmbench("mmbench-cn", "MMB-CN", "mmbench_dev_cn_20231003", "请直接回答选项字母。")
