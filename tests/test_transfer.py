"""The protocol `transfer`: the parts of the items, the mixture, and a cell."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from test_examples import tiny_load

import keras_cc.demo
from keras_cc import comparison
from keras_cc.comparison import UNTUNED, Cells, Transfer, relations, transfer_run
from keras_cc.comparison.mixing import mix
from keras_cc.comparison.relations import load_relation, split
from keras_cc.report.transfer import summarise

pytest.importorskip("scipy", reason='keras_cc.evaluation needs "keras-cc[evaluation]"')

TARGETS = ("tr", "sw")


def rows_of(languages=("en", *TARGETS, "es"), items=12):
    """Rows whose answers are the same in every language."""
    return [
        {
            "id": f"a/{number}",
            "lang": language,
            "instruction": f"{language} {number}?",
            "instruction_en": f"en {number}?",
            "output": f"K{number % 3}",
            "answers": [f"K{number % 3}"],
            "part": relations.PARTS[number % 3],
        }
        for number in range(items)
        for language in languages
    ]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of())), encoding="utf-8")
    return str(path)


def small(file, **settings):
    settings = {
        "model": "demo:tiny",
        "task": "rows",
        "data": file,
        "languages": ("en", *TARGETS),
        "unseen_languages": ("es",),
        "steps": 10,
        "batch_size": 5,
        **settings,
    }
    return settings


# ---------------------------------------------------------------- items and their parts


@pytest.mark.once
class TestRelations:
    @pytest.mark.parametrize("score_on", relations.SCORED_ON)
    def test_parts_share_no_item_and_languages_share_all(self, score_on):
        pytest.importorskip("babel", reason="the CLDR set needs babel")
        found = load_relation("currency_code", ("en", "tr", "es"), score_on)["rows"]
        ids = {part: [row["id"] for row in found[part]["en"]] for part in relations.PARTS}
        for part, by_language in found.items():
            assert len(set(ids[part])) == len(ids[part]) > 10
            for rows in by_language.values():
                assert [row["id"] for row in rows] == ids[part]
        together = [id for some in ids.values() for id in some]
        assert len(set(together)) == len(together)

    def test_what_is_scored_to_choose_is_no_test_territory(self):
        cldr = pytest.importorskip("keras_cc.data.cldr")
        pytest.importorskip("babel", reason="the CLDR set needs babel")
        found = {
            score_on: load_relation("currency", ("en", "tr"), score_on)["rows"]
            for score_on in relations.SCORED_ON
        }
        for rows in found["dev"].values():
            assert all(cldr.territory_split(row["id"][-2:]) != "test" for row in rows["en"])
        for part in ("pairs", "held_out"):
            rows = found["test"][part]["en"]
            assert all(cldr.territory_split(row["id"][-2:]) == "test" for row in rows)

    def test_a_file_says_its_parts(self, file):
        found = load_relation("rows", ("en", "tr"), data=file)
        assert [row["id"] for row in found["rows"]["held_out"]["tr"]] == [
            "a/11", "a/2", "a/5", "a/8"
        ]  # fmt: skip
        assert found["left_out"] == 0

    def test_items_that_a_language_lacks_are_counted(self):
        rows = collections.defaultdict(list)
        for row in rows_of(("en", "tr")):
            if row["id"] != "a/3" or row["lang"] == "en":
                rows[row["lang"]].append(row)
        assert split(rows, lambda row: row["part"])["left_out"] == 1

    def test_what_does_not_fit_is_refused(self, tmp_path):
        def by_language(rows):
            found = collections.defaultdict(list)
            for row in rows:
                found[row["lang"]].append(row)
            return found

        def refuses(message, rows):
            with pytest.raises(ValueError, match=message):
                split(by_language(rows), lambda row: row["part"])

        rows = rows_of(("en", "tr"))
        refuses("must share ids.*a/0", [
            {**row, "id": row["id"] + row["lang"]} for row in rows
        ])  # fmt: skip
        refuses("must be in one part.*'a/1' in 'pairs' and, in 'tr', in 'train'", [
            {**row, "part": "train"} if (row["id"], row["lang"]) == ("a/1", "tr") else row
            for row in rows
        ])  # fmt: skip
        refuses("must have an item.*held_out", [r for r in rows if r["part"] != "held_out"])
        refuses("once in a language.*'a/0' twice in 'en'", [*rows, rows[0]])
        refuses("an `id` is needed", [{k: v for k, v in rows[0].items() if k != "id"}, *rows])
        alike = [{**row, "output": "K"} for row in rows]
        found = split(by_language(alike), lambda row: row["part"])["rows"]
        with pytest.raises(ValueError, match="two answers to choose among"):
            relations.candidates(found)
        with pytest.raises(ValueError, match="`relation` must be one of"):
            load_relation("capital", ("en", "tr"))
        with pytest.raises(ValueError, match="`data` must be given for 'mkqa'"):
            load_relation("mkqa", ("en", "tr"))
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with pytest.raises(ValueError, match=r"`languages` must be some of.*\['sw'\]"):
            load_relation("rows", ("en", "sw"), data=str(path))
        path.write_text(json.dumps({**rows[1], "instruction_en": " "}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"row 0: .* must be text.*instruction_en=' '"):
            load_relation("rows", ("en", "tr"), data=str(path))

    def test_a_file_need_not_repeat_itself(self, tmp_path):
        rows = [{k: v for k, v in row.items() if k != "answers"} for row in rows_of(("en", "tr"))]
        for row in rows:
            if row["lang"] == "en":
                del row["instruction_en"]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        found = load_relation("rows", ("en", "tr"), data=str(path))["rows"]
        assert found["train"] == {
            language: [row for row in rows_of((language,)) if row["part"] == "train"]
            for language in ("en", "tr")
        }


# ---------------------------------------------------------------- the mixture


@pytest.mark.once
class TestMixture:
    def test_shares_hold_in_every_step_and_rows_come_in_turn(self):
        kinds = {"a": list("abcdefg"), "b": list("xyz")}
        found = mix(kinds, [(35, {"a": 0.6, "b": 0.4}), (10, {"a": 0.2, "b": 0.8})], 5, seed=3)
        assert len(found) == 45 * 5
        for step in range(45):
            batch = found[5 * step : 5 * step + 5]
            assert sum(row in "xyz" for row in batch) == (2 if step < 35 else 4)
        letters = [row for row in found if row in "abcdefg"]
        for start in range(0, len(letters) - 6, 7):  # all of them before one comes again
            assert sorted(letters[start : start + 7]) == list("abcdefg")
        assert letters[:7] != letters[7:14]
        assert mix(kinds, [(35, {"a": 0.6, "b": 0.4}), (10, {"a": 0.2, "b": 0.8})], 5, 3) == found

    def test_the_order_of_a_kind_does_not_depend_on_the_others_share(self):
        kinds = {"a": list("abcdefg"), "b": list("xyz")}
        one, other = (
            [row for row in mix(kinds, [(20, {"a": share, "b": 1 - share})], 5) if row in "abcdefg"]
            for share in (0.2, 0.6)
        )
        assert other[: len(one)] == one

    @pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.5}, {"a": 0.5}, {"a": 1.5, "c": -0.5}])
    def test_shares_that_cannot_be_are_refused(self, shares):
        with pytest.raises(ValueError, match="`shares` must be of kinds that have rows"):
            mix({"a": [1], "b": [], "c": [2]}, [(2, shares)], 4)

    def kinds(self, rows):
        """How often each kind of row comes: its part, whether English, whether answered."""
        return collections.Counter(
            (row["part"], row["lang"] == "en", row["output"] is not None) for row in rows
        )

    def test_who_learns_from_pairs_has_them_late(self, file):
        experiment = Transfer(**small(file))
        rows = experiment.load_rows()["rows"]
        found = transfer_run.training_rows(experiment, rows, takes_pairs=True)
        early, late = self.kinds(found[:25]), self.kinds(found[25:])
        assert sum(count for (_, english, _), count in early.items() if english) == 10
        assert early["train", False, True] == 15
        assert late["train", False, True] == 5 and late["pairs", False, False] == 10
        assert {part for part, english, _ in early if english} == set(relations.PARTS)
        without = self.kinds(transfer_run.training_rows(experiment, rows, takes_pairs=False))
        assert without["train", False, True] == 30
        assert not [k for k in without if not k[2] or (not k[1] and k[0] != "train")]

    def test_the_bounds(self, file):
        floor, ceiling = (Transfer.parse(name, **small(file)) for name in ("floor", "ceiling"))
        rows = floor.load_rows()["rows"]
        found = self.kinds(transfer_run.training_rows(floor, rows, False))
        assert {part for part, _, _ in found} == {"train"}
        found = self.kinds(transfer_run.training_rows(ceiling, rows, False))
        assert {part for part, english, _ in found if not english} == set(relations.PARTS)


# ---------------------------------------------------------------- an experiment


@pytest.mark.once
class TestExperiment:
    def test_names_and_keys(self, file):
        settings = small(file)
        sft, floor = (Transfer.parse(name, **settings) for name in ("sft", "floor"))
        assert (sft.name, floor.name) == ("sft", "floor")
        assert (floor.recipe, floor.facts) == ("sft", "none")
        assert len({sft.key, floor.key, dataclasses.replace(sft, pair_share=0.3).key}) == 3
        untuned = [dataclasses.replace(one, recipe=UNTUNED).key for one in (sft, floor)]
        assert untuned[0] == untuned[1] != sft.key

    def test_own_answers_begin_when_pairs_do(self, file):
        made = Transfer.parse("own_answers", **small(file)).resolve().objectives()[0]
        assert (made.start, made.divergence) == (5, "labels")
        made = Transfer.parse("own_answers start=7 refresh=2", **small(file)).resolve()
        assert (made.objectives()[0].start, made.objectives()[0].refresh) == (7, 2)

    def test_what_is_asked_in_turn_is_practised_before(self, file):
        made = Transfer.parse("own_answers_in_turn refresh=3", **small(file))
        assert made.asks_in_turn and made.resolve().objectives()[0].start == 5 - 3
        made = Transfer.parse("own_answers_in_turn", **small(file))
        assert made.resolve().objectives()[0].start == 0  # every 50 steps, of 10
        assert not Transfer.parse("own_answers", **small(file)).asks_in_turn
        assert not Transfer(UNTUNED, **small(file)).asks_in_turn

    def test_the_file_is_part_of_the_key(self, file, tmp_path):
        before = Transfer(**small(file))
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps(rows_of()[0]), encoding="utf-8")
        assert before._own_facts() != dataclasses.replace(before, data=str(other))._own_facts()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"task": "capital"}, "`task` must be one of"),
            ({"facts": "some"}, "`facts` must be one of"),
            ({"score_on": "held_out"}, "`score_on` must be one of"),
            ({"english_share": 0.7}, "`english_share` must be above 0, and with `pair_share`"),
            ({"english_share": 0.0}, "`english_share` must be above 0"),
            ({"pairs_from": 1.5}, "`pairs_from` must be a number"),
            ({"languages": ("en",)}, "`languages` must be English and others"),
            ({"unseen_languages": ("tr",)}, "`unseen_languages` none of them"),
            ({"steps": 0}, "`steps` must be an integer >= 1"),
        ],
    )
    def test_wrong_values_are_refused(self, wrong, message, file):
        with pytest.raises(ValueError, match=message):
            Transfer(**small(file, **wrong))


# ---------------------------------------------------------------- scores, a cell


@pytest.mark.once
def test_the_wrong_language_is_another_ones_answer():
    rows = {
        "en": [{"id": 1, "answers": ["Kenyan shilling"]}, {"id": 2, "answers": ["euro"]}],
        "tr": [{"id": 1, "answers": ["Kenya şilini"]}, {"id": 2, "answers": ["euro"]}],
    }
    said = {"en": ["Kenya şilini", "euro"], "tr": ["kenyan shilling!", "Euro"]}
    found = transfer_run._wrong_language(said, rows)
    assert found == {"en": [1.0, 0.0], "tr": [1.0, 0.0]}
    said = {"en": ["x", "euro"], "tr": ["şilin", "euro"]}
    assert transfer_run._wrong_language(said, rows) == {"en": [0.0, 0.0], "tr": [0.0, 0.0]}


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(keras_cc.demo, "load", tiny_load)


@pytest.mark.thorough("sft")
@pytest.mark.parametrize("method", ["sft", "own_answers", "own_answers_in_turn", "cc_distilled"])
def test_a_cell_holds_what_a_report_needs(method, file, tiny_demo):
    cell = comparison.run(Transfer.parse(method, **small(file, curve=2)), verbose=0)
    assert json.loads(json.dumps(cell)) == cell
    scored = dict.fromkeys(("en", *TARGETS, "es"), 8)
    assert set(cell["scores"]) >= {"exact_match", "choice", "nll", "wrong_language"}
    for by_language in cell["scores"].values():
        assert {language: len(values) for language, values in by_language.items()} == scored
    assert cell["parts"]["tr"] == ["pairs"] * 4 + ["held_out"] * 4
    assert set(cell["borrowed"]) == {"in_context", *(["connected"] if method[0] == "c" else [])}
    assert cell["curve"]["step"] == [5, 10]
    last = cell["curve"]["nll"][-1]["tr"]
    np.testing.assert_allclose(last, cell["scores"]["nll"]["tr"], rtol=1e-4)
    found = summarise([cell])["methods"][method]
    assert found["nll"]["pairs"]["mean"] == pytest.approx(
        np.mean([cell["scores"]["nll"][language][:4] for language in TARGETS])
    )
    assert set(found["nll"]) == {"pairs", "held_out", "pairs unseen", "held_out unseen"}


@pytest.mark.once
def test_cells_know_the_untuned_model_of_theirs(file, tiny_demo, tmp_path):
    untuned = Transfer(UNTUNED, **small(file, curve=0))
    cells = Cells(tmp_path / "cells")
    cells.add(untuned, comparison.run(untuned, verbose=0))
    assert "choice" not in cells[untuned]["scores"]
    sft = dataclasses.replace(untuned, recipe="sft")
    cells.add(sft, comparison.run(sft, verbose=0))
    before = cells.load([untuned, sft])[1]["before"]
    assert before["exact_match"]["tr"] == np.mean(cells[untuned]["scores"]["exact_match"]["tr"])


@pytest.mark.once
@pytest.mark.parametrize("recipe", ["translation_sft", "cross_lingual_sft", "distilled_sft"])
def test_recipes_that_make_rows_of_their_own_are_refused(recipe, file):
    with pytest.raises(ValueError, match="`recipe` must leave the rows as they are"):
        Transfer(recipe, **small(file))
