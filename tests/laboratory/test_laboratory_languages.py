"""The laboratory's languages, its text, and the rows of its relations."""

import collections
import itertools
import re
from typing import ClassVar

import pytest

from keras_cc.comparison import Transfer, relations
from keras_cc.comparison.relations import load_relation
from keras_cc.laboratory import LANGUAGES, corpus, documents, facts, grammar, laboratory_rows
from keras_cc.laboratory.grammar import languages, shared_words, vocabulary

pytestmark = pytest.mark.once

PLACE = ("old", "mill")


def words_of(text):
    return re.findall(r"\w+", text)


class TestLanguages:
    def test_a_seed_gives_the_same_words_and_another_one_others(self):
        again = languages.__wrapped__(0)
        assert {k: again[k].words for k in again} == {k: v.words for k, v in languages().items()}
        other = languages(1)
        assert other["en"].words == again["en"].words
        assert other["xa"].words != again["xa"].words
        assert shared_words(1) != shared_words(0)

    def test_languages_have_no_word_in_common_but_the_shared_ones(self):
        spoken = languages()
        own = {code: set(language.words.values()) for code, language in spoken.items()}
        for one, other in itertools.combinations(LANGUAGES, 2):
            assert own[one] & own[other] == shared_words()
        for language in spoken.values():
            assert len(set(language.words.values())) == len(language.words)
            assert not set(language.words.values()) & {*grammar.NAMES, *grammar.CODES}

    def test_a_share_is_common_and_answers_are_not(self):
        shared = shared_words()
        for kind in (grammar.ADJECTIVES, grammar.NOUNS, grammar.VERBS):
            assert len(shared & set(kind)) == len(kind) / 4
        assert not shared & {*grammar.THINGS, *grammar.RELATIONS}

    def test_order_differs_and_words_are_those_of_the_language(self):
        spoken = languages()
        assert spoken["en"].question("code", PLACE) == "what is the code of the old mill?"
        assert spoken["en"].fact("owner", PLACE, "anna") == "the owner of the old mill is anna."
        orders = set()
        for language in spoken.values():
            text = language.event("fox", "likes", "owl", PLACE)
            english = {word: gloss for gloss, word in language.words.items()}
            glosses = [english[word] for word in words_of(text)]
            orders.add(tuple(g for g in glosses if g in {"fox", "likes", "owl", "old", "mill"}))
        assert orders == {
            ("fox", "likes", "owl", "old", "mill"),
            ("mill", "old", "fox", "owl", "likes"),
            ("likes", "fox", "owl", "mill", "old"),
        }

    def test_a_name_and_a_code_are_the_same_in_every_language(self):
        for language in languages().values():
            assert (language.word("anna"), language.word("k3")) == ("anna", "k3")

    @pytest.mark.parametrize("seed", [-1, 0.5, "a", True])
    def test_a_wrong_seed_is_refused(self, seed):
        with pytest.raises(ValueError, match=r"`seed` must be an integer >= 0\. Received: seed="):
            languages(seed)


class TestText:
    def texts(self, seed=0, count=4000):
        return list(itertools.islice(documents(seed), count))

    def test_a_seed_gives_the_same_text(self):
        assert self.texts(count=50) == self.texts(count=50) != self.texts(1, count=50)

    def test_every_word_is_in_the_vocabulary(self):
        known = set(vocabulary())
        assert {word for text in self.texts() for word in words_of(text)} <= known
        assert len(known) == len(vocabulary())

    def test_no_place_of_an_item_is_told_a_fact_of(self):
        world = corpus.world()
        items = {
            row["instruction"]
            for relation in facts.RELATIONS
            for seed in (0, 1)
            for row in laboratory_rows(LANGUAGES, relation, 128, seed)
        }
        asked = {line for text in self.texts() for line in re.split(r"\n|(?<=[.?]) ", text)}
        assert not items & asked
        assert not set(world.items) & {*world.facts, *world.made_up}

    def test_what_a_language_tells_of_known_places_is_true(self):
        world, spoken = corpus.world(), languages()
        told = {
            language.question(relation, place): (code, language.word(world.facts[place][relation]))
            for code, language in spoken.items()
            for place, some in world.told[code].items()
            for relation in some
        }
        seen = collections.Counter()
        for text in self.texts():
            question, _, answer = text.partition("\n")
            if question in told:
                code, truth = told[question]
                assert answer == truth
                seen[code] += 1
        assert seen["en"] > seen["xa"] > 50 and seen["xb"] > 50

    def test_few_documents_say_the_same_in_two_languages(self):
        only = {
            code: set(language.words.values()) - shared_words()
            for code, language in languages().items()
        }
        both = sum(
            sum(bool(own & set(words_of(text))) for own in only.values()) > 1
            for text in self.texts()
        )
        expected = corpus.KINDS["parallel"] + (1 - corpus.KINDS["parallel"]) * corpus.MIXED
        assert 0.5 * expected < both / 4000 <= expected + 0.03


class TestRows:
    @pytest.mark.parametrize("score_on", relations.SCORED_ON)
    @pytest.mark.parametrize("relation", facts.RELATIONS)
    def test_ids_are_shared_and_parts_are_not(self, relation, score_on):
        found = load_relation(relation, LANGUAGES, score_on, items=100)
        assert found["left_out"] == 0
        ids = []
        for by_language in found["rows"].values():
            english = [row["id"] for row in by_language["en"]]
            assert len(english) > 10
            for rows in by_language.values():
                assert [row["id"] for row in rows] == english
            ids += english
        assert len(set(ids)) == len(ids) == 100

    def test_codes_are_the_same_in_every_language_and_words_are_not(self):
        for relation in facts.RELATIONS:
            rows = laboratory_rows(LANGUAGES, relation, 120)
            for n in range(0, len(rows), 3):
                three = rows[n : n + 3]
                assert [row["lang"] for row in three] == list(LANGUAGES)
                assert len({row["id"] for row in three}) == 1
                assert len({row["output"] for row in three}) == (1 if relation[-1] == "e" else 3)
                assert len({row["instruction"] for row in three}) == 3
                assert {row["instruction_en"] for row in three} == {three[0]["instruction"]}
        english = [row["output"] for row in rows if row["lang"] == "en"]
        assert len(set(english)) == len(english)  # a word of one place each

    def test_shared_words_are_those_of_the_name(self):
        rows = laboratory_rows("xa", "lab_code", 200)
        for row in rows:
            shared = shared_words() & set(words_of(row["instruction"]))
            assert row["shared_words"] == len(shared)
        assert {row["shared_words"] for row in rows} == {0, 1, 2}

    def test_seeds_have_other_places(self):
        one, other = (laboratory_rows("en", "lab_code", 500, seed) for seed in (0, 1))
        assert not {row["instruction"] for row in one} & {row["instruction"] for row in other}
        fewer = laboratory_rows("en", "lab_code", 10)
        assert fewer == one[:10]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["en", "tr"], "lab_code", 10), r"`languages` must be one of \('en', 'xa', 'xb'\)"),
            (("en", "code", 10), "`relation` must be one of"),
            (("en", "lab_code", 501), "`items` must be an integer from 1 to 500. Received: items"),
            (("en", "lab_word", 129), "`items` must be an integer from 1 to 128"),
            (("en", "lab_word", 0), "`items` must be an integer from 1 to 128"),
            (("en", "lab_word", 9, 2), "`seed` must be an integer from 0 to 1"),
        ],
    )
    def test_wrong_values_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            laboratory_rows(*arguments)


class TestTransfer:
    settings: ClassVar = dict(
        model="demo:laboratory", task="lab_code", languages=("en", "xa", "xb")
    )

    def test_the_model_is_part_of_the_key(self, monkeypatch):
        from keras_cc.demo import laboratory_preset

        keys = []
        for found in ("a", "b", "a"):
            monkeypatch.setattr(laboratory_preset, "fingerprint", lambda found=found: found)
            keys.append(Transfer(**self.settings).key)
        assert keys[0] == keys[2] != keys[1]

    def test_a_laboratory_of_ones_own_and_rows_of_ones_own_pass(self):
        Transfer(**{**self.settings, "model": "my_laboratory"})
        Transfer(**{**self.settings, "task": "rows", "data": "rows.jsonl"})

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"languages": ("en", "tr")}, r"`languages` must be some of .*'lab_code'.*'tr'"),
            ({"unseen_languages": ("tr",)}, "`languages` must be some of"),
            ({"model": "demo:gemma3_270m"}, "`model` must be 'demo:laboratory', or a preset of"),
            ({"task": "currency_code"}, "`task` must be one of .* for the laboratory's model"),
            ({"task": "born", "model": "demo:gemma3_270m"}, "`task` must be one of"),
            ({"task": "lab_word"}, "`items` must be at most 128 for 'lab_word'. Received: items="),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            Transfer(**{**self.settings, **wrong})
