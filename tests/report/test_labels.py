"""Labels of languages: their names, and that no label has letters that its fonts lack."""

import io

import pytest

from keras_cc.data.languages import NAMES
from keras_cc.report import labels

pytestmark = pytest.mark.once

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def only_dejavu(monkeypatch):
    monkeypatch.setattr(labels, "_fonts", tuple)


def drawn(text, families):
    """Draws a label; a missing glyph is a warning, and a warning is an error here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 0.5))
    figure.text(0.1, 0.5, text, fontfamily=families)
    figure.savefig(io.BytesIO(), dpi=50)


class TestNames:
    def test_known(self):
        assert labels.english_name("sw") == "Swahili"
        assert labels.own_name("zh") == "中文"

    def test_the_same_in_both_is_said_once(self):
        assert labels.own_name("en") == "" and labels.label("en")[0] == "English"

    def test_unknown_is_the_code(self):
        assert labels.english_name("tlh") == "tlh" and labels.own_name("tlh") == ""
        assert labels.label("tlh")[0] == "tlh"

    def test_regions_are_told_apart(self):
        assert [labels.english_name(code) for code in ("pt-BR", "pt-PT")] == ["pt-BR", "pt-PT"]


class TestFonts:
    @pytest.mark.parametrize("code", NAMES)
    def test_labels_draw_with_the_fonts_at_hand(self, code):
        text, families = labels.label(code)
        assert text.startswith(labels.english_name(code))
        drawn(text, families)

    @pytest.mark.parametrize("code", NAMES)
    def test_labels_draw_where_no_other_font_is_installed(self, code, only_dejavu):
        text, families = labels.label(code)
        assert families == ["DejaVu Sans"]
        drawn(text, families)

    def test_what_dejavu_has_and_lacks(self, only_dejavu):
        assert labels.label("ar")[0] == "Arabic · العربية"
        assert labels.label("ru")[0] == "Russian · русский"
        assert labels.label("th")[0] == "Thai" and labels.label("zh")[0] == "Chinese"

    def test_a_missing_letter_would_be_seen(self):
        with pytest.raises(UserWarning, match="missing from font"):
            drawn("中文", ["DejaVu Sans"])

    def test_text_that_no_font_has(self, only_dejavu):
        assert labels.drawable("方法 a") == ("?? a", ["DejaVu Sans"])
        assert labels.drawable("cc_α") == ("cc_α", ["DejaVu Sans"])

    def test_a_font_of_boxes_is_no_font(self):
        names = {name for name, _ in labels._fonts()}
        assert names and not any(name.startswith("Last Resort") for name in names)

    def test_without_shaping_complex_scripts_are_left_out(self, monkeypatch):
        from matplotlib import ft2font

        assert labels.label("ar")[0] == "Arabic · العربية"
        monkeypatch.delattr(ft2font, "__libraqm_version__")
        assert labels.label("ar")[0] == "Arabic"
        assert labels.label("hi")[0] == "Hindi"
        assert labels.label("tr")[0] == "Turkish · Türkçe"

    def test_matplotlib_shapes_and_orders_arabic(self):
        """Joined letters are other glyphs than lone ones, and narrower; the first is rightmost."""
        from matplotlib import font_manager

        font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))

        def width(text):
            font.set_text(text, 0)
            return font.get_width_height()[0]

        word = "العربية"
        assert width(word) < sum(map(width, word))
