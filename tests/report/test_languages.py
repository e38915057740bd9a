"""Names of languages, and that no label has letters that its fonts lack."""

import io

import pytest

from keras_cc.report import languages

pytestmark = pytest.mark.once

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def only_dejavu(monkeypatch):
    monkeypatch.setattr(languages, "_fonts", tuple)


def drawn(text, families):
    """Draws a label; a missing glyph is a warning, and a warning is an error here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 0.5))
    figure.text(0.1, 0.5, text, fontfamily=families)
    figure.savefig(io.BytesIO(), dpi=50)


class TestNames:
    def test_known(self):
        assert languages.english_name("sw") == "Swahili"
        assert languages.own_name("zh") == "中文"

    def test_the_same_in_both_is_said_once(self):
        assert languages.own_name("en") == "" and languages.label("en")[0] == "English"

    def test_unknown_is_the_code(self):
        assert languages.english_name("tlh") == "tlh" and languages.own_name("tlh") == ""
        assert languages.label("tlh")[0] == "tlh"

    @pytest.mark.parametrize("code", languages.NAMES)
    def test_names_are_those_of_cldr(self, code):
        locale = pytest.importorskip("babel").Locale.parse(code)
        own = locale.get_display_name(code)
        assert languages.NAMES[code] == (locale.get_display_name("en"), own)

    def test_the_languages_of_the_benchmarks_are_known(self):
        codes = "ar bg bn de el en es eu et fr hi ht id it ja ko my pt qu ro ru sw ta te th tr ur"
        assert {*codes.split(), "vi", "yo", "zh"} <= set(languages.NAMES)


class TestFonts:
    @pytest.mark.parametrize("code", languages.NAMES)
    def test_labels_draw_with_the_fonts_at_hand(self, code):
        text, families = languages.label(code)
        assert text.startswith(languages.english_name(code))
        drawn(text, families)

    @pytest.mark.parametrize("code", languages.NAMES)
    def test_labels_draw_where_no_other_font_is_installed(self, code, only_dejavu):
        text, families = languages.label(code)
        assert families == ["DejaVu Sans"]
        drawn(text, families)

    def test_what_dejavu_has_and_lacks(self, only_dejavu):
        assert languages.label("ar")[0] == "Arabic · العربية"
        assert languages.label("ru")[0] == "Russian · русский"
        assert languages.label("th")[0] == "Thai" and languages.label("zh")[0] == "Chinese"

    def test_a_missing_letter_would_be_seen(self):
        with pytest.raises(UserWarning, match="missing from font"):
            drawn("中文", ["DejaVu Sans"])

    def test_text_that_no_font_has(self, only_dejavu):
        assert languages.drawable("方法 a") == ("?? a", ["DejaVu Sans"])
        assert languages.drawable("cc_α") == ("cc_α", ["DejaVu Sans"])

    def test_a_font_of_boxes_is_no_font(self):
        names = {name for name, _ in languages._fonts()}
        assert names and not any(name.startswith("Last Resort") for name in names)

    def test_without_shaping_complex_scripts_are_left_out(self, monkeypatch):
        from matplotlib import ft2font

        assert languages.label("ar")[0] == "Arabic · العربية"
        monkeypatch.delattr(ft2font, "__libraqm_version__")
        assert languages.label("ar")[0] == "Arabic"
        assert languages.label("hi")[0] == "Hindi"
        assert languages.label("tr")[0] == "Turkish · Türkçe"

    def test_matplotlib_shapes_and_orders_arabic(self):
        """Joined letters are other glyphs than lone ones, and narrower; the first is rightmost."""
        from matplotlib import font_manager

        font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))

        def width(text):
            font.set_text(text, 0)
            return font.get_width_height()[0]

        word = "العربية"
        assert width(word) < sum(map(width, word))
