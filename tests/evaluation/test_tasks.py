"""Benchmarks: what they are, and their rows, read from files."""

import json

import pytest

from keras_cc.evaluation.tasks import TASKS, Task, get, load

pytestmark = pytest.mark.once


def row(language, id, instruction, output):
    return {
        "lang": language, "id": id, "instruction": instruction, "output": output,
        "instruction_en": "the quick fox", "answers": [output],
    }  # fmt: skip


QUESTIONS = {
    "en": [row("en", "a", "the quick fox", "the dog"), row("en", "b", "a fox?", "yes")],
    "tr": [row("tr", "a", "hızlı", "Kenya şilini"), row("tr", "b", "bir", "iki")],
}
STORY = "{}\n(1) yes\n(2) no\nWhich?"
CHOICES = {name: [row(name, 1, STORY.format(name), "1")] for name in ("en", "tr")}


class TestTask:
    def test_the_benchmarks(self):
        assert get("xnli").options == ("1", "2", "3")
        assert get("mmmlu").options == ("A", "B", "C", "D")
        assert get("xquad").metrics == ("exact_match", "f1", "contains")
        assert {task.metric for task in TASKS.values() if task.kind != "generate"} == {"accuracy"}
        assert get(TASKS["mgsm"]) is TASKS["mgsm"]
        assert not get("xlsum").is_parallel
        assert {name for name, task in TASKS.items() if task.folder is None} == {"cldr"}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("x", "choose", ("accuracy",)), "`kind` must be one of"),
            (("x", "options", ("accuracy",)), "`options` must be two or more"),
            (("x", "options", ("accuracy",), ("1", "1")), "`options` must be two or more"),
            (("x", "generate", ("f1",), ("1", "2")), "of kind 'options' alone"),
            (("x", "generate", ("accuracy",)), "`metrics` of kind 'generate'"),
            (("x", "generate", ()), "`metrics` of kind 'generate'"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Task(*arguments)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="must be a Task or one of"):
            get("xnlu")


class TestLoad:
    @pytest.fixture
    def folder(self, tmp_path):
        for task, of in (("xstorycloze", CHOICES), ("mkqa", QUESTIONS)):
            for language, rows in of.items():
                file = tmp_path / "dev" / task / f"{language}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return tmp_path

    def test_rows_by_language(self, folder):
        assert load("mkqa", folder) == QUESTIONS
        assert list(load("mkqa", str(folder), "dev", ["tr", "en"])) == ["tr", "en"]
        assert load("xstorycloze", folder, languages=["tr"]) == {"tr": CHOICES["tr"]}

    def test_endings_are_taken_apart(self, folder):
        file = folder / "dev" / "xstorycloze" / "tr.jsonl"
        whole = {**CHOICES["tr"][0], "instruction_en": STORY.format("a fox")}
        file.write_text(json.dumps(whole), "utf-8")
        (found,) = load("xstorycloze_endings", folder, languages=["tr"])["tr"]
        assert (found["instruction"], found["instruction_en"]) == ("tr", "a fox")
        assert (found["output"], found["answers"]) == (" yes", ["yes"])
        assert found["endings"] == [" yes", " no"]
        file.write_text(json.dumps({**whole, "instruction": "tr"}), "utf-8")
        with pytest.raises(ValueError, match=r"tr\.jsonl, row 1: the instruction must be a story"):
            load("xstorycloze_endings", folder, languages=["tr"])

    def test_cldr_needs_no_folder(self):
        pytest.importorskip("babel")
        rows = load("cldr", None, "dev", ["tr", "en"])
        assert list(rows) == ["tr", "en"]
        for language, of_language in rows.items():
            assert {row["lang"] for row in of_language} == {language}
        ids = {split: {r["id"] for r in load("cldr", None, split, ["tr"])["tr"]}
               for split in ("train", "dev", "test")}  # fmt: skip
        assert ids["dev"] and not ids["dev"] & (ids["train"] | ids["test"])

    def test_missing(self, folder):
        with pytest.raises(FileNotFoundError, match=r"tasks \['mkqa', 'xstorycloze'\]"):
            load("xnli", folder)
        with pytest.raises(FileNotFoundError, match=r"train/mkqa/LANGUAGE\.jsonl"):
            load("mkqa", folder, "train")
        with pytest.raises(FileNotFoundError, match=r"some of \['en', 'tr'\].*\['sw'\] are miss"):
            load("mkqa", folder, languages=["tr", "sw"])
        with pytest.raises(FileNotFoundError, match="No data"):
            load("mkqa", folder / "nowhere")
        with pytest.raises(ValueError, match="`folder` must be given"):
            load("mkqa", None)
        with pytest.raises(TypeError, match="list of codes"):
            load("mkqa", folder, languages="tr")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"id": None}, r"row 1: no \['id'\]"),
            ({"answers": None}, r"no \['answers'\]"),
            ({"answers": "yes"}, "'answers' must be a list"),
            ({"answers": []}, "'answers' must be a list"),
            ({"lang": "sw"}, "must be in 'tr'. Received: lang='sw'"),
            ({"output": 3}, "'output' must be a string"),
        ],
    )
    def test_columns(self, folder, change, message):
        changed = {**QUESTIONS["tr"][0], **change}
        (folder / "dev" / "mkqa" / "tr.jsonl").write_text(json.dumps(changed), "utf-8")
        with pytest.raises(ValueError, match=message):
            load("mkqa", folder, languages=["tr"])
