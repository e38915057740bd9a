"""`ModelCard`: what a reader must know of a model, beside the model."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from keras_cc.version import __version__

FILE = "README.md"

# Licence of a base model, by how its name begins: what its publisher says.
LICENCES = {
    "gemma": "Gemma Terms of Use (ai.google.dev/gemma/terms); they pass on to tuned models",
    "smollm": "Apache-2.0",
    "mistral": "Apache-2.0",
    "llama3": "Llama 3 Community License (Meta); it passes on to tuned models",
    "bloom": "BigScience RAIL License",
    "gpt2": "MIT",
    "phi3": "MIT",
    "falcon": "Apache-2.0",
}
_UNKNOWN = "not given"


@dataclasses.dataclass
class ModelCard:
    """What stands in the `README.md` beside an exported model. What is not given is said to be so.

    Attributes:
        base_model: name of the model that was tuned, such as `"gemma3_270m"`.
        method: what it was tuned with; by default what `CCCausalLM` knows of it: connection,
            objectives and their options.
        languages: codes of the languages that it was tuned for.
        data: what it was tuned on.
        report: `results.json` of `keras_cc.report.write` (path or dict), for the measured scores.
        report_method: name of this model's method in that report. Default: the only one.
        licence: of the base model. By default what its publisher says, for names that are known.

    Raises (of `text` and `write`):
        ValueError: if the report has no such method, or several and none is named.

    Example:

    ```python
    card = keras_cc.export.ModelCard("gemma3_270m", languages=["tr", "sw"], data="CLDR questions")
    keras_cc.save_preset(stock, "my_gemma")
    card.write("my_gemma")
    ```
    """

    base_model: str | None = None
    method: str | None = None
    languages: Sequence[str] = ()
    data: str | None = None
    report: "str | os.PathLike[str] | dict[str, Any] | None" = None
    report_method: str | None = None
    licence: str | None = None

    def write(self, folder: "str | os.PathLike[str]") -> pathlib.Path:
        """Write the card into a folder as `README.md`; returns its path.

        Raises:
            FileExistsError: if there is a `README.md` already.
        """
        path = pathlib.Path(folder) / FILE
        with open(path, "x", encoding="utf-8") as file:
            file.write(self.text())
        return path

    def text(self) -> str:
        """The card, as Markdown."""
        facts = {
            "Base model": self.base_model,
            "Method": self.method,
            "Languages": ", ".join(self.languages) or None,
            "Data": self.data,
            "Licence of the base model": self.licence or _licence(self.base_model),
        }
        lines = [f"# {self.base_model or 'A language model'}, tuned with keras_cc", ""]
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| {name} | {_cell(value or _UNKNOWN)} |" for name, value in facts.items()]
        lines += ["", "## Scores", "", *self._scores(), ""]
        lines.append(f"Written by keras_cc {__version__}.")
        return "\n".join(lines) + "\n"

    def _scores(self):
        if self.report is None:
            return ["Not measured, or not given."]
        report = self.report
        if not isinstance(report, dict):
            report = json.loads(pathlib.Path(report).read_text(encoding="utf-8"))
        method = self._method_of(report)
        interval = f"{report['confidence']:.0%} interval"
        lines = [
            f"{report['metric']} in percent on {report['task']}, method `{method['name']}`, "
            f"{len(method['seeds'])} seed(s); in brackets the {interval}. This model is one of the "
            "seeds or a model tuned alike.",
            "",
            "| language | score | items |",
            "| --- | ---: | ---: |",
        ]
        for language in report["languages"]:
            score = method["scores"][language]
            lines.append(f"| {language} | {_percent(score)} | {report['rows'][language]} |")
        if method.get("average"):
            lines.append(f"| average without English | {_percent(method['average'])} | |")
        return lines

    def _method_of(self, report):
        methods = {method["name"]: method for method in report["methods"]}
        name = self.report_method
        if name is None and len(methods) == 1:
            (name,) = methods
        if name not in methods:
            raise ValueError(
                f"`report_method` must be one of the report's methods, {sorted(methods)}. "
                f"Received: report_method={self.report_method!r}"
            )
        return methods[name]


def _licence(base_model):
    name = (base_model or "").lower().removeprefix("demo:").replace("-", "").replace("_", "")
    return next((text for start, text in LICENCES.items() if name.startswith(start)), None)


def _cell(text):
    return " ".join(str(text).split()).replace("|", "\\|")


def _percent(score):
    return f"{100 * score['mean']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"
