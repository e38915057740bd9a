"""Lexicons: what a file gives, and what `code_switch` refuses to look words up in."""

import pytest

from keras_cc.data import code_switch, load_lexicon

pytestmark = pytest.mark.once

TR = {
    "id": 1,
    "lang": "tr",
    "instruction": "Kedi uyuyor. Köpek ne yapıyor?",
    "instruction_en": "The cat sleeps. What does the dog do?",
    "output": "2",
}
SW = {"lang": "sw", "instruction": "Paka analala.", "instruction_en": "The cat sleeps."}


class TestLoadLexicon:
    def read(self, path, text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return load_lexicon(path)

    def test_tabs_spaces_and_several_translations(self, tmp_path):
        text = "\ufeffdog köpek\r\ncat\tkedi\n\ndog it\ndog  köpek\nplay tennis\ttenis oynamak\n"
        assert self.read(tmp_path / "en-tr.txt", text) == {
            "dog": ("köpek", "it"),
            "cat": ("kedi",),
            "play tennis": ("tenis oynamak",),
        }
        assert load_lexicon(str(tmp_path / "en-tr.txt"))["cat"] == ("kedi",)

    def test_what_it_reads_switches(self, tmp_path):
        lexicon = self.read(tmp_path / "en-ar.txt", "cat قطة\ndog كلب")
        row = {**TR, "instruction_en": "The cat", "lang": "ar"}
        assert code_switch([row], lexicon, ratio=1)[0]["instruction"] == "The قطة"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("dog köpek\ncat\n", "a.txt:2: not two columns.*Received: 'cat'"),
            ("ice cream dondurma", "a.txt:1: not two columns"),
            ("dog\t", "not two columns"),
            ("a\tb\tc", "not two columns"),
            (b"dog k\xf6pek", "a.txt:1: 'utf-8' codec.*Received: b'dog"),
            (" \n\n", "no line.*path="),
        ],
    )
    def test_refused(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            self.read(tmp_path / "a.txt", text)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="`path` must be a text file"):
            load_lexicon(tmp_path)


WORDS = {"cat": "kedi", "dog": ("köpek", "it"), "sleeps": ["uyuyor"]}
BAD = {
    "no lexicon": (TypeError, [TR], None, "`lexicon` must be a dict.*lexicon=None"),
    "list": (TypeError, [TR], [("cat", "kedi")], "`lexicon` must be a dict"),
    "empty": (ValueError, [TR], {}, r"`lexicon` must have at least one.*\{\}"),
    "empty of one": (ValueError, [TR], {"tr": {}}, r"`lexicon\['tr'\]` must have"),
    "mixed": (ValueError, [TR], {"tr": WORDS, "cat": "kedi"}, "not both"),
    "number": (ValueError, [TR], {"cat": 3}, r"lexicon\['cat'\]=3"),
    "number inside": (ValueError, [TR], {"tr": {"cat": [3]}}, r"\['cat'\]=\[3\]"),
    "no words": (ValueError, [TR], {"cat": []}, r"a list of strings.*=\[\]"),
    "blank": (ValueError, [TR], {"cat": " "}, "a list of strings.*=' '"),
    "set": (ValueError, [TR], {"cat": {"kedi"}}, "a list of strings"),
    "key": (ValueError, [TR], {3: "kedi"}, r"lexicon\[3\]='kedi'"),
    "other": (ValueError, [TR, SW], {"tr": WORDS}, "row 1: .*'sw'.*'tr'"),
    "no lang": (ValueError, [{**TR, "lang": None}], {"tr": WORDS}, "id 1: .*None"),
    "two languages": (ValueError, [TR, SW], WORDS, r"of one language.*\['sw', 'tr'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    error, rows, lexicon, message = BAD[case]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        code_switch(rows, lexicon)
    assert "Received" in str(caught.value)
