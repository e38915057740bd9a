"""Reports of a comparison: tables, pictures and one HTML page, from the cells' JSON.

    paths = keras_cc.report.write(cells, "report/xnli")
    paths["report.html"]

`grouping` says which cells stand in one report, `summary` computes what is shown, `tables`,
`pictures` and `html` show it. Nothing here needs a model or a backend.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from keras_cc.report.grouping import check
from keras_cc.report.html import page
from keras_cc.report.one_run import draw_run as draw_run
from keras_cc.report.pictures import draw, require_matplotlib
from keras_cc.report.summary import summarise
from keras_cc.report.tables import markdown
from keras_cc.report.transfer import is_transfer
from keras_cc.report.transfer import summarise as summarise_transfer


def write(
    cells: Iterable[dict[str, Any]],
    folder: str | pathlib.Path,
    baseline: str = "sft",
    title: str | None = None,
) -> dict[str, pathlib.Path]:
    """Writes the report of one group of cells: one model, task, set of languages and metric.

    Cells of one name are one method with several seeds. Differences to the baseline are paired by
    language, item and seed, over the seeds that both have.

    Args:
        cells: dicts, as a comparison stores them.
        folder: where to write; made where it is not there. Files of an earlier report are
            replaced.
        baseline: name of the method that the others are compared with. Without a cell of that
            name, differences are left out and the report says so.
        title: heading; by default the task and the model.

    Returns:
        From file name to path: `"results.json"`, `"results.md"`, `"report.html"`, and those of
        `keras_cc.report.pictures.NAMES` whose data is there.

    Raises:
        ValueError: for cells that do not stand in one table; nothing is written then.
        ModuleNotFoundError: where matplotlib or scipy is not installed.

    Example:

    ```python
    import json, pathlib

    cells = [json.loads(path.read_text()) for path in pathlib.Path("cells").glob("*.json")]
    cldr = [cell for cell in cells if cell["config"]["task"] == "cldr"]
    keras_cc.report.write(cldr, "report/cldr")["report.html"]
    ```
    """
    cells = check(cells)
    require_matplotlib()
    summary = summarise(cells, baseline)
    if is_transfer(cells):
        summary["transfer"] = summarise_transfer(cells, baseline)
    if title is None:
        title = f"{summary['task']} with {summary['model']}"
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(summary, cells, folder)
    texts = {
        "results.json": json.dumps(
            {"title": title, **summary, "captions": {p.path.name: p.caption for p in pictures}},
            ensure_ascii=False,
            indent=1,
            allow_nan=False,
        ),
        "results.md": markdown(summary, title),
        "report.html": page(summary, cells, pictures, title),
    }
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / name
        paths[name].write_text(text, encoding="utf-8")
    return {**paths, **{picture.path.name: picture.path for picture in pictures}}
