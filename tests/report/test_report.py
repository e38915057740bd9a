"""`report.write`: every file, self-contained, from the cells alone."""

import base64
import html.parser
import json
import re
import subprocess
import sys

import pytest
from made_cells import BEST, cell, three

from keras_cc import report
from keras_cc.report import grouping, pictures
from keras_cc.report.pictures import NAMES
from keras_cc.report.summary import summarise

pytestmark = pytest.mark.once

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
OF_A_TASK = tuple(name for name in NAMES if name != "crossing.png")  # that is of `transfer`
PNG = b"\x89PNG\r\n\x1a\n"


class Page(html.parser.HTMLParser):
    """Tags with attributes, whether they nest, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report.write(three(), tmp_path_factory.mktemp("report") / "deep" / "xnli")


class TestFiles:
    def test_every_file_is_there(self, written):
        assert set(written) == {"results.json", "results.md", "report.html", *OF_A_TASK}
        assert len(OF_A_TASK) == 6
        for name, path in written.items():
            assert path.name == name and path.stat().st_size > 0
            assert name[-4:] != ".png" or path.read_bytes().startswith(PNG)

    def test_only_pictures_whose_data_is_there(self, tmp_path):
        report.write(three(), tmp_path)
        bare = [cell(history={}), cell("cc", scores=BEST, history={})]
        written = report.write(bare, tmp_path)
        assert set(written) == {"results.json", "results.md", "report.html", "scores.png"}
        # Those of the earlier report are gone, not left to be taken for this one's.
        assert {path.name for path in tmp_path.iterdir()} == set(written)

    def test_json(self, written):
        found = json.loads(written["results.json"].read_text(encoding="utf-8"))
        assert found["title"] == "xnli with demo:tiny"
        assert found["methods"][1]["average"]["mean"] == 1.0
        assert set(found["captions"]) == set(OF_A_TASK)

    def test_nothing_is_written_for_cells_that_do_not_fit(self, tmp_path):
        cells = [cell(), cell("cc", config={"task": "xcopa"})]
        with pytest.raises(ValueError, match="same task"):
            report.write(cells, tmp_path / "report")
        assert not (tmp_path / "report").exists()

    def test_odd_cells_are_drawn(self, tmp_path):
        """One item, one epoch, a broken epoch, a constant gate, names that are no letters."""
        flat = {"layers": [7], "gate": {"tr": [0.5]}, "alignment_error": {"tr": [0.0]}}
        names = ("$x_1$ <b>&", "方法 " + "long name " * 12)
        scores = {"tr": [1]}
        cells = [
            cell(name, scores=scores, repeat=1, atlas=flat, history=history)
            for name, history in zip(
                names,
                (
                    {"step": [3], "val_sft_loss": [2.0]},
                    {"step": [3, 4], "val_sft_loss": [2.0, float("nan")]},
                ),
                strict=True,
            )
        ]
        written = report.write(cells, tmp_path, baseline=names[0], title="<i>&")
        page = Page(written["report.html"].read_text(encoding="utf-8"))
        assert not page.all("i") and not page.all("b") and names[0] in page.words
        assert "alignment_error.png" in written and "gate_by_dimension.png" not in written


def test_curves_are_drawn_over_the_steps():
    """Two methods whose epochs differ in length; the mean goes as far as the shortest seed."""
    long, short = [3.0, 2.0, 1.0], [2.0, 1.0]
    cells = [
        cell(history={"step": [60, 120], "val_sft_loss": short}),
        cell("cc", 0, history={"step": [4, 8, 10], "val_sft_loss": long}),
        cell("cc", 1, history={"step": [4, 8], "val_sft_loss": short}),
    ]
    figure, _, caption = pictures._curves(summarise(cells), grouping.methods(cells))
    sft, cc = figure.axes if figure.axes[0].get_title() == "sft" else figure.axes[::-1]
    drawn = [[line.get_xydata().T.tolist() for line in axis.lines] for axis in (sft, cc)]
    sfts, means = [[60, 120], short], [[4, 8], [2.5, 1.5]]
    assert drawn[0] == [sfts, sfts]  # its one seed, and the mean
    assert drawn[1] == [[[4, 8, 10], long], [[4, 8], short], means, sfts]
    assert "Lowest monolingual loss: sft with 1.000, after 120 of 120 steps." in caption


class TestPage:
    def test_it_is_self_contained(self, written):
        text = written["report.html"].read_text(encoding="utf-8")
        page = Page(text)
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
        assert not re.search(r"https?://|@import|url\(", text)
        sources = [image["src"] for image in page.all("img")]
        assert len(sources) == 6
        for source, name in zip(sources, OF_A_TASK, strict=True):
            kind, data = source.split(",", 1)
            assert kind == "data:image/png;base64"
            assert base64.b64decode(data) == written[name].read_bytes()

    def test_light_dark_and_phone(self, written):
        text = written["report.html"].read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(
            text
        ).all("meta")
        assert text.count('class="wide"') == 2 + 6  # what is wider than a phone scrolls by itself

    def test_tables_captions_and_configuration(self, written):
        page = Page(written["report.html"].read_text(encoding="utf-8"))
        assert len(page.all("table")) == 2
        assert len(page.all("figcaption")) == len(page.all("img")) == 6
        assert all(image["alt"] for image in page.all("img"))
        assert {"class": "own", "lang": "ar"} in page.all("bdi") and "العربية" in page.words
        assert page.all("td").count({"class": "best"}) == 3
        words = "".join(page.words)
        assert "the gate opens most at layers 3 to 4" in words
        assert '"epochs": 3' in words and '"trained": 100' in words
        assert len(page.all("details")) == 1

    def test_notes(self, tmp_path):
        written = report.write([cell("cc")], tmp_path)
        for name in ("report.html", "results.md"):
            text = written[name].read_text(encoding="utf-8")
            assert "No cell is named" in text and "Bold" not in text.split("</style>")[-1]


class TestPackages:
    def test_it_imports_where_matplotlib_is_not_installed(self):
        script = "import sys; sys.modules['matplotlib'] = None; import keras_cc.report"
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_without_matplotlib_the_error_says_how_to_get_it(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "keras-cc\[report\]"'):
            report.write(three(), tmp_path / "report")
        assert not (tmp_path / "report").exists()

    def test_the_caller_s_style_is_left_alone(self, written, tmp_path):
        import matplotlib

        with matplotlib.rc_context({"font.size": 33, "text.parse_math": True}):
            report.write([cell()], tmp_path)
            assert matplotlib.rcParams["font.size"] == 33
            assert matplotlib.rcParams["text.parse_math"] is True
