"""`load_jsonl`: what it reads, and what it refuses with file and line."""

import gzip
import json
import os
from pathlib import Path

import pytest

from keras_cc.data import load_jsonl, readers

pytestmark = pytest.mark.once

ROW = {"instruction": "Habari?", "output": "Nzuri", "instruction_en": "How are you?", "lang": "sw"}
DATA = Path(os.environ.get("KERAS_CC_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def write(path, *rows, end="\n"):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def test_a_file_keeps_every_key_and_the_order(tmp_path):
    rows = [{**ROW, "id": i, "answers": ["a", "b"]} for i in range(3)]
    assert load_jsonl(write(tmp_path / "a.jsonl", *rows)) == rows
    assert load_jsonl(str(write(tmp_path / "b.jsonl", *rows, end=""))) == rows


def test_a_pair_of_prompts_may_be_without_an_answer(tmp_path):
    null, missing = {**ROW, "output": None}, {k: v for k, v in ROW.items() if k != "output"}
    assert load_jsonl(write(tmp_path / "a.jsonl", ROW, null, missing)) == [ROW, null, missing]
    own = {"instruction": "Habari?", "english": "How are you?"}
    path = write(tmp_path / "b.jsonl", own)
    assert load_jsonl(path, pivot_column="english") == [own]
    with pytest.raises(ValueError, match=r"b\.jsonl:1: 'output' must be a string"):
        load_jsonl(path)


def test_folders_patterns_and_lists(tmp_path):
    (tmp_path / "deep").mkdir()
    b = write(tmp_path / "b.jsonl", {**ROW, "id": "b"})
    write(tmp_path / "a.jsonl", {**ROW, "id": "a"})
    write(tmp_path / "c.txt", {**ROW, "id": "c"})
    deep = write(tmp_path / "deep" / "d.jsonl", {**ROW, "id": "d"})
    ids = lambda path: [row["id"] for row in load_jsonl(path)]  # noqa: E731
    assert ids(tmp_path) == ["a", "b"]
    assert ids(str(tmp_path / "?.jsonl")) == ["a", "b"]
    assert ids(str(tmp_path / "**" / "*.jsonl")) == ["a", "b", "d"]
    assert ids([b, deep]) == ["b", "d"]
    assert ids([tmp_path, str(deep)]) == ["a", "b", "d"]


def test_packed_files(tmp_path):
    plain = write(tmp_path / "b.jsonl", {**ROW, "id": "b"})
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(plain.read_bytes().replace(b'"id": "b"', b'"id": "a"'))
    )
    assert [row["id"] for row in load_jsonl(tmp_path)] == ["a", "b"]
    assert load_jsonl(tmp_path / "a.jsonl.gz") == [{**ROW, "id": "a"}]
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    for name, damaged in {"cut": packed[:-9], "none": b"{}\n", "bit": packed[:-2] + b"xx"}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz: not a whole gzip file"):
            load_jsonl(path)


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    write(folder / "a.jsonl", ROW)
    assert load_jsonl(folder) == [ROW]
    assert load_jsonl(folder / "a.jsonl") == [ROW]


def test_byte_order_mark_blank_lines_and_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(ROW).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\n")
    assert load_jsonl(path) == [ROW, ROW]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    row = {**ROW, "instruction": "one\u2028two\x85three"}
    assert load_jsonl(write(tmp_path / "a.jsonl", row)) == [row]


def test_languages_and_limit(tmp_path):
    rows = [{**ROW, "lang": lang, "id": i} for i, lang in enumerate(["sw", "hi", "sw", "en"])]
    path = write(tmp_path / "a.jsonl", *rows)
    assert [r["id"] for r in load_jsonl(path, languages=["sw", "en"])] == [0, 2, 3]
    assert [r["id"] for r in load_jsonl(path, languages={"sw"}, limit=1)] == [0]
    assert [r["id"] for r in load_jsonl([path, path], limit=6)] == [0, 1, 2, 3, 0, 1]


def test_own_column_names(tmp_path):
    row = {"prompt": "a", "answer": "b", "language": "sw"}
    path = write(tmp_path / "a.jsonl", row)
    names = {"instruction_column": "prompt", "output_column": "answer"}
    names["lang_column"] = "language"
    assert load_jsonl(path, languages=["sw"], **names) == [row]
    with pytest.raises(ValueError, match=r"'instruction' must be a string.*keys \['answer'"):
        load_jsonl(path)


BAD_LINES = {
    "not JSON": ('{"instruction": ', "Expecting value"),
    "not an object": ('["a", "b"]', "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "no instruction": ({"output": "x"}, "'instruction' must be a string"),
    "no output": ({"instruction": "x"}, "'output' must be a string"),
    "None": (
        {**ROW, "output": None, "instruction_en": None},
        "'output' must be a string. Received: None",
    ),
    "a number": ({**ROW, "output": 2}, "'output' must be a string. Received: 2"),
    "a blank pivot": (
        {**ROW, "output": None, "instruction_en": " "},
        "'output' must be a string. Received: None",
    ),
    "an empty answer": ({**ROW, "output": " "}, "'output' is empty"),
    "an empty prompt": ({**ROW, "instruction": ""}, "'instruction' is empty"),
    "a number for a language": ({**ROW, "lang": 3}, "'lang' must be a string"),
    "a list for a pivot": ({**ROW, "instruction_en": ["x"]}, "'instruction_en' must be a string"),
    "a key twice": (
        '{"instruction": "a", "output": "b", "output": "c"}',
        "'output' is there twice",
    ),
    "a key twice, deep": ('{"instruction": "a", "x": [{"y": 1, "y": 2}]}', "'y' is there twice"),
    "deep": ('{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "half a pair": (
        '{"instruction": "a\\ud800", "output": "b"}',
        "UTF-8 has, which this is not at",
    ),
    "cut": (json.dumps(ROW)[:-20], "Unterminated string"),
    "a number of many digits": ('{"instruction": ' + "9" * 10_000 + "}", "Exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named_by_file_and_line(tmp_path, name):
    line, message = BAD_LINES[name]
    path = write(tmp_path / "bad.jsonl", ROW, "", line, ROW)
    with pytest.raises(ValueError) as error:
        load_jsonl(path)
    assert message in str(error.value)
    assert "bad.jsonl:3:" in str(error.value)
    assert "Received: " in str(error.value)


def test_bad_rows_go_where_they_are_told_to(tmp_path):
    lines = [line for line, _ in BAD_LINES.values()]
    path = write(tmp_path / "some.jsonl", *[{**ROW, "id": n} for n in range(100)], *lines[:2], ROW)
    bad = tmp_path / "bad.jsonl"
    with pytest.warns(
        UserWarning, match=r"2 of 103 rows are bad, and in .*bad\.jsonl'.*:101: Expe"
    ):
        rows = load_jsonl(path, on_bad_row="quarantine", quarantine=bad)
    assert [row.get("id") for row in rows] == [*range(100), None]
    found = [json.loads(line) for line in bad.read_text(encoding="utf-8").splitlines()]
    assert [(one["file"], one["line"]) for one in found] == [(str(path), 101), (str(path), 102)]
    assert [one["row"] for one in found] == lines[:2]
    assert "Expecting value" in found[0]["reason"] and "not a JSON object" in found[1]["reason"]
    # Too many, and they are there to be looked at.
    path = write(tmp_path / "many.jsonl", ROW, *lines)
    with pytest.raises(ValueError, match=rf"`most_bad` allows 50\.0% .*: {len(lines)} of"):
        load_jsonl(path, on_bad_row="quarantine", quarantine=bad, most_bad=0.5)
    assert len(bad.read_text(encoding="utf-8").splitlines()) == len(lines)
    with pytest.warns(UserWarning, match="rows are bad"):
        assert load_jsonl(path, on_bad_row="quarantine", quarantine=bad, most_bad=1) == [ROW]
    with pytest.raises(ValueError, match="`quarantine` must not be one of the files"):
        load_jsonl(tmp_path, on_bad_row="quarantine", quarantine=bad)
    # None, and there is no file.
    bad.unlink()
    path = write(tmp_path / "good.jsonl", ROW)
    assert load_jsonl(path, on_bad_row="quarantine", quarantine=bad) == [ROW]
    assert not bad.exists()


def test_a_line_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    long = json.dumps({**ROW, "output": "x" * 5000})
    path = write(tmp_path / "a.jsonl", ROW, long, {**ROW, "id": 1}, long)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a line of more than 1000 bytes"):
        load_jsonl(path)
    bad = tmp_path / "bad.jsonl"
    with pytest.warns(UserWarning, match="2 of 4 rows are bad"):
        rows = load_jsonl(path, on_bad_row="quarantine", quarantine=bad, most_bad=0.5)
    assert rows == [ROW, {**ROW, "id": 1}]
    assert [json.loads(line)["line"] for line in bad.read_text().splitlines()] == [2, 4]
    exact = {**ROW, "output": ""}
    exact["output"] = "x" * (1000 - len(json.dumps(exact)))
    assert load_jsonl(write(tmp_path / "b.jsonl", exact, end="")) == [exact]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "skip"}, "`on_bad_row` must be"),
        ({"on_bad_row": "quarantine"}, "`quarantine` must be a path with on_bad_row='quarantine'"),
        ({"quarantine": "bad.jsonl"}, "`quarantine` must be a path with on_bad_row='quarantine'"),
        ({"most_bad": 1.5}, "`most_bad` must be a number"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_jsonl(write(tmp_path / "a.jsonl", ROW), **options)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: .*utf-8"):
        load_jsonl(path)


def test_a_row_without_a_language_cannot_be_selected(tmp_path):
    row = {k: v for k, v in ROW.items() if k != "lang"}
    path = write(tmp_path / "a.jsonl", row)
    assert load_jsonl(path) == [row]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no 'lang'"):
        load_jsonl(path, languages=["sw"])


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Empty dataset"):
        load_jsonl(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ValueError, match=r"Empty dataset.*\['xx'\]"):
        load_jsonl(write(tmp_path / "a.jsonl", ROW), languages=["xx"])
    for missing in ("none.jsonl", "*.json", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="No file matches"):
            load_jsonl(tmp_path / missing)


@pytest.mark.parametrize("path", [[], None, 3])
def test_bad_paths(path):
    with pytest.raises(ValueError, match="`path` must be"):
        load_jsonl(path)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_bad_limits(tmp_path, limit):
    with pytest.raises(ValueError, match="`limit`"):
        load_jsonl(write(tmp_path / "a.jsonl", ROW), limit=limit)


def test_languages_as_one_string(tmp_path):
    with pytest.raises(TypeError, match="`languages` must be a list"):
        load_jsonl(write(tmp_path / "a.jsonl", ROW), languages="sw")


@pytest.mark.skipif(not DATA.is_dir(), reason="no paired data (set KERAS_CC_DATA to its folder)")
def test_the_real_data():
    files = sorted((DATA / "train").glob("*/*.jsonl"))
    lines = sum(len(f.read_bytes().rstrip(b"\n").split(b"\n")) for f in files)
    rows = load_jsonl(str(DATA / "train" / "*" / "*.jsonl"))
    assert len(rows) == lines > 0
    turkish = load_jsonl(DATA / "train" / "xnli", languages=["tr"])
    assert turkish == [r for r in rows if r["task"] == "xnli" and r["lang"] == "tr"]
