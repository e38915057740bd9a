"""The report as one HTML file: own style, pictures inside, nothing loaded from anywhere."""

import base64
import html
import json
import string
from collections.abc import Sequence
from typing import Any

from keras_cc.report.entries import Table
from keras_cc.report.labels import english_name, own_name
from keras_cc.report.pictures import Picture
from keras_cc.report.tables import protocol, tables

# What a cell says of its own run, beside its configuration.
_FACTS = ("key", "rows", "steps", "chosen", "fit", "parameters", "seconds", "inference")

_PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --text: #1b1b1b; --back: #fff; --soft: #5c5c5c; --line: #d9d9d9; --best: #e3f0fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --back: #16181b; --soft: #a5a5a5; --line: #3a3d42; --best: #17364d; }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, "Noto Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, li, figcaption { max-width: 48rem; }
.protocol, .notes, figcaption, .detail, .own { color: var(--soft); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; border-bottom: 1px solid var(--line); }
th:first-child { position: sticky; left: 0; z-index: 1; text-align: left; background: var(--back);
  max-width: 12rem; white-space: normal; overflow-wrap: break-word; }
tbody th { font-weight: normal; } tbody tr + tr > * { border-top: 1px solid var(--line); }
.best { background: var(--best); font-weight: bold; }
.detail, .own { display: block; font-size: .75rem; font-weight: normal; }
figure { margin: 0; } figcaption { font-size: .95rem; padding-top: .5rem; }
.wide img { display: block; max-width: 100%; height: auto; background: #fff; }
@media (max-width: 44rem) { .wide img { max-width: none; width: 40rem; } }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px;
  font-size: .8rem; }
summary { cursor: pointer; padding: .4rem 0; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="protocol">$protocol</p>
$tables
$notes
$figures
<h2>Configuration</h2>
<details><summary>Everything that the cells were run with</summary>
$configuration
</details>
</body>
</html>
""")


def page(
    summary: dict[str, Any],
    cells: Sequence[dict[str, Any]],
    pictures: Sequence[Picture],
    title: str,
) -> str:
    """The whole report, to be written to one file.

    Args:
        summary: of `keras_cc.report.summary.summarise`.
        cells: the cells that it is of.
        pictures: of `keras_cc.report.pictures.draw`; their files are read.
        title: heading of the page.

    Returns:
        HTML.
    """
    own = {english_name(code): code for code in summary["languages"] if own_name(code)}
    return _PAGE.substitute(
        title=html.escape(title),
        protocol=html.escape(protocol(summary)),
        tables="\n".join(_table(table, own) for table in tables(summary)),
        notes=_notes(summary),
        figures="\n".join(map(_figure, pictures)),
        configuration=_configuration(summary, cells),
    )


def _table(table: Table, own):
    head = "".join(f'<th scope="col">{html.escape(h)}{_own(h, own)}</th>' for h in table.header)
    rows = []
    for row in table.rows:
        first = f'<th scope="row">{html.escape(row[0].text)}</th>'
        rest = "".join(
            ('<td class="best">' if entry.best else "<td>")
            + html.escape(entry.text)
            + (f'<span class="detail">{html.escape(entry.detail)}</span>' if entry.detail else "")
            + "</td>"
            for entry in row[1:]
        )
        rows.append(f"<tr>{first}{rest}</tr>")
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _own(header, own):
    """A language's name in itself, under its English one."""
    if header not in own:
        return ""
    code = own[header]
    return f'<bdi class="own" lang="{code}">{html.escape(own_name(code))}</bdi>'


def _notes(summary):
    notes = list(summary["notes"])
    if summary["baseline"] is not None:
        notes.insert(
            0,
            "Bold: the best of its column, where its paired interval against "
            f"{summary['baseline']} excludes 0.",
        )
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _figure(picture: Picture):
    data = base64.b64encode(picture.path.read_bytes()).decode()
    lines = [html.escape(line) for line in picture.caption]
    return (
        f"<h2>{html.escape(picture.heading)}</h2>\n"
        f'<figure><div class="wide" tabindex="0"><img alt="{" ".join(lines)}" '
        f'src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
    )


def _configuration(summary, cells):
    parts = [("Shared by all methods", summary["settings"])]
    for method in summary["methods"]:
        runs = [
            {
                "seed": cell["config"].get("seed"),
                **{key: cell[key] for key in _FACTS if key in cell},
            }
            for cell in cells
            if cell["name"] == method["name"]
        ]
        parts.append((method["name"], {**method["settings"], "cells": runs}))
    parts.append(("Machines", summary["machines"]))
    return "\n".join(
        f"<h3>{html.escape(name)}</h3>\n<pre>{html.escape(_json(value))}</pre>"
        for name, value in parts
    )


def _json(value):
    return json.dumps(value, ensure_ascii=False, indent=2)
