"""Spreadsheets with the standard library: one sheet of text and numbers, which is all that MMBench's server takes."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from jaxvlm.evals.question_file import EvalError

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPE}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="r1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="r1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_xlsx(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """A sheet with a line of column names; whole numbers stay numbers, what a row lacks is an empty cell."""

    def cell(place: str, value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, int):
            return f'<c r="{place}"><v>{value}</v></c>'
        text = escape(_NOT_XML.sub("\ufffd", str(value)))
        return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'

    lines = [dict(zip(columns, columns, strict=True)), *rows]
    written = "".join(
        f'<row r="{y}">'
        + "".join(cell(f"{_letters(x)}{y}", row.get(name)) for x, name in enumerate(columns))
        + "</row>"
        for y, row in enumerate(lines, 1)
    )
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{written}</sheetData></worksheet>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in (_PARTS | {"xl/worksheets/sheet1.xml": sheet}).items():
            file.writestr(name, _HEAD + part)


def _letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def read_xlsx(path: Path) -> list[dict]:
    """The first sheet's rows by the names in its first row; cells as text.

    Raises `EvalError` for a file that is no such workbook.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            sheet = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
            strings = "xl/sharedStrings.xml"
            shared = ElementTree.fromstring(file.read(strings)) if strings in names else ()
    except (OSError, KeyError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise EvalError(f"{path} is not a workbook whose first sheet can be read: {error}.") from None
    texts = ["".join(part.text or "" for part in item.iter(f"{{{_MAIN}}}t")) for item in shared]
    lines = []
    for row in sheet.iter(f"{{{_MAIN}}}row"):
        line = {}
        for cell in row:
            value = "".join(part.text or "" for part in cell.iter() if part.tag in (f"{{{_MAIN}}}v", f"{{{_MAIN}}}t"))
            if value:
                line[cell.get("r", "").rstrip("0123456789")] = texts[int(value)] if cell.get("t") == "s" else value
        lines.append(line)
    head = lines[0] if lines else {}
    return [{name: line.get(column, "") for column, name in head.items()} for line in lines[1:]]
