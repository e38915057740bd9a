"""Scores of a model on a task, against likelihoods that are computed apart."""

import connected
import numpy as np
import pytest
import tiny

import keras_cc
from keras_cc.evaluation import TaskResult, evaluate
from keras_cc.evaluation.scorer import LogLikelihood, Scorer
from keras_cc.evaluation.tasks import Task, get

LENGTH = 96
CHOICE = "\n(1) yes\n(2) no\n\nWhich?\nAnswer:"


def choice(language, id, story, output):
    return {
        "task": "xstorycloze", "lang": language, "id": id, "instruction": story + CHOICE,
        "instruction_en": "the fox" + CHOICE, "output": output, "answers": [output],
    }  # fmt: skip


CHOICES = {
    "en": [choice("en", 1, "the fox", "1"), choice("en", 2, "the lazy dog", "2")],
    "tr": [choice("tr", 1, "tilki", "1"), choice("tr", 2, "tembel bir dog", "2")],
}


def question(language, id, instruction, output, *others):
    return {
        "lang": language, "id": id, "instruction": instruction, "output": output,
        "instruction_en": "the quick fox", "answers": [output, *others],
    }  # fmt: skip


QUESTIONS = {
    "en": [question("en", "a", "the quick fox", "the dog"), question("en", "b", "a fox?", "yes")],
    "tr": [
        question("tr", "a", "hızlı", "Kenya şilini", "şilin"),
        question("tr", "b", "Kenya'nın para birimi nedir?", "şilin"),
        question("tr", "c", "bir", "iki"),
    ],
}


def make(connection=None, sampler="greedy", template=None, max_length=LENGTH, **options):
    preprocessing = {"template": template, "max_length": max_length}
    return connected.answering_model(connection, sampler, preprocessing, **options)


@pytest.fixture(scope="module")
def shared():
    return make()


@pytest.fixture(scope="module")
def scorer(shared):
    return Scorer(shared, batch_size=4, verbose=0)


class CannedScorer:
    """Stands in for `Scorer`: notes the requests, answers by `say(number, context, rest)`."""

    max_length = None

    def __init__(self, model, say=lambda number, context, rest: -1.0):
        self.model, self.preprocessor, self.say = model, model.preprocessor, say
        self.requests = []

    def log_likelihoods(self, requests, pivots=None):
        self.requests, self.pivots = requests, pivots
        return [
            LogLikelihood(self.say(number, *request), False, len(request[1]))
            for number, request in enumerate(requests)
        ]


def by_hand(model, prompt, answer, with_end=False):
    """Log-likelihood of an answer: ids, forward pass and softmax apart from the scorer."""
    tokenizer = model.preprocessor.tokenizer
    context = [tokenizer.start_token_id, *tokenizer.tokenize(prompt)]
    rest = list(tokenizer.tokenize(answer)) + [tokenizer.end_token_id] * with_end
    ids = np.zeros((1, LENGTH), "int32")
    ids[0, : len(context + rest)] = context + rest
    mask = (np.arange(LENGTH) < len(context + rest)).astype("int32")[None]
    logits = connected.logits(model, {"token_ids": ids, "padding_mask": mask})
    nats = connected.cross_entropy(logits, np.roll(ids, -1, axis=1))[0]
    return -nats[len(context) - 1 : len(context + rest) - 1].sum(), len(rest)


class TestOptions:
    def test_against_likelihoods_by_hand(self, shared, scorer):
        found = evaluate(shared, "xstorycloze", CHOICES, scorer=scorer, verbose=0)
        assert found.items == {"en": ["1", "2"], "tr": ["1", "2"]}
        for language, rows in CHOICES.items():
            for i, row in enumerate(rows):
                totals = [by_hand(shared, row["instruction"], option)[0] for option in "12"]
                best = "12"[int(np.argmax(totals))]
                assert found.predictions[language][i] == best
                assert found.scores["accuracy"][language][i] == (best == row["output"])
                total, tokens = by_hand(shared, row["instruction"], row["output"], with_end=True)
                expected = pytest.approx(-total / tokens, abs=1e-4)
                assert found.scores["nll"][language][i] == expected

    def test_options_of_several_tokens(self, shared, scorer):
        task = Task("yes or no", "options", ("accuracy",), ("yes", "no", "Kenya"))
        rows = {"en": [question("en", "a", "the fox", "no"), question("en", "b", "dog", "Kenya")]}
        found = evaluate(shared, task, rows, scorer=scorer)
        for i, row in enumerate(rows["en"]):
            hand = [by_hand(shared, row["instruction"], option) for option in task.options]
            assert sorted({tokens for _, tokens in hand}) != [1]
            best = task.options[int(np.argmax([total for total, _ in hand]))]
            assert found.predictions["en"][i] == best

    def test_nll_is_what_evaluate_of_the_model_says(self, shared, scorer):
        found = evaluate(shared, "cldr", QUESTIONS, scorer=scorer, max_new_tokens=1, verbose=0)
        rows = [row for of_language in QUESTIONS.values() for row in of_language]
        nll = np.concatenate(list(found.scores["nll"].values()))
        for row, value in zip(rows, nll, strict=True):
            metrics = shared.evaluate([row], batch_size=1, verbose=0, return_dict=True)
            assert value == pytest.approx(metrics["sft_loss"], abs=1e-4)

    def test_under_a_template(self):
        model = make(template="llama3")
        found = evaluate(model, "xstorycloze", {"tr": CHOICES["tr"][:1]}, verbose=0)
        (row,) = CHOICES["tr"][:1]
        metrics = model.evaluate([row], batch_size=1, verbose=0, return_dict=True)
        assert found.scores["nll"]["tr"][0] == pytest.approx(metrics["sft_loss"], abs=1e-4)

    @pytest.mark.thorough
    def test_the_path_of_a_user(self):
        """A connected model's likelihoods are those of its transform, without a pivot."""
        model = make("fused")
        found = evaluate(model, "xstorycloze", CHOICES, verbose=0)
        plain = evaluate(make(), "xstorycloze", CHOICES, verbose=0)
        row = CHOICES["tr"][0]
        metrics = model.evaluate([row], batch_size=1, verbose=0, return_dict=True)
        assert found.scores["nll"]["tr"][0] == pytest.approx(metrics["sft_loss"], abs=1e-4)
        assert abs(found.scores["nll"]["tr"][0] - plain.scores["nll"]["tr"][0]) > 1e-3

    def test_the_pivot_where_an_intervention_reads_it(self):
        model = make(intervention=keras_cc.XTransplant(0, 1))
        found = evaluate(model, "xstorycloze", {"tr": CHOICES["tr"][:1]}, verbose=0)
        metrics = model.evaluate(CHOICES["tr"][:1], batch_size=1, verbose=0, return_dict=True)
        assert found.scores["nll"]["tr"][0] == pytest.approx(metrics["sft_loss"], abs=1e-4)
        plain = evaluate(make(), "xstorycloze", {"tr": CHOICES["tr"][:1]}, verbose=0)
        assert abs(found.scores["nll"]["tr"][0] - plain.scores["nll"]["tr"][0]) > 1e-4

    def test_a_model_that_cannot_tell_scores_what_guessing_does(self):
        model = make()
        for variable in model.weights:
            variable.assign(0 * variable)
        rows = {"en": [{**CHOICES["en"][0], "output": o, "answers": [o]} for o in "123"]}
        found = evaluate(model, "xnli", rows, verbose=0)
        assert found.scores["accuracy"]["en"] == pytest.approx([1 / 3] * 3)
        assert found.predictions["en"] == [None] * 3
        vocabulary = model.tokenizer.vocabulary_size()
        assert found.scores["nll"]["en"] == pytest.approx([np.log(vocabulary)] * 3, abs=1e-5)

    def test_ties(self, shared):
        # Two golds, then the options 1, 2, 3 of the rows whose gold is "1" and "3".
        totals = [-9.0, -9.0, -1.0, -1.0, -4.0, -2.0, -2.0 + 1e-6, -5.0]
        rows = {"en": [{**CHOICES["en"][0], "output": o, "answers": [o]} for o in "13"]}
        canned = CannedScorer(shared, lambda number, *_: totals[number])
        found = evaluate(shared, "xnli", rows, scorer=canned)
        assert found.scores["accuracy"]["en"].tolist() == [0.5, 0.0]
        totals[3] = -1.0001  # nearly a tie is none
        found = evaluate(shared, "xnli", rows, scorer=canned)
        assert found.scores["accuracy"]["en"].tolist() == [1.0, 0.0]
        assert found.predictions["en"] == ["1", None]

    def test_likelihoods_that_are_no_numbers(self, shared):
        for value in (float("nan"), float("-inf")):
            canned = CannedScorer(shared, lambda number, *_, v=value: v if number == 4 else -1.0)
            with pytest.raises(FloatingPointError, match="en: row with id 1"):
                evaluate(shared, "xstorycloze", CHOICES, scorer=canned)


STORIES = [
    ("the quick fox", [" jumped over the lazy dog", " no"]),
    ("a dog", [" is it", " yes", " is it yes"]),
]


def ending(language, id, story, endings, right):
    return {
        "lang": language, "id": id, "instruction": story, "instruction_en": "the fox",
        "endings": endings, "output": endings[right], "answers": [endings[right].strip()],
    }  # fmt: skip


class TestEndings:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"endings": None}, "row with id 1: 'endings' must be a list of two or more"),
            ({"endings": " fox"}, "'endings' must be a list of two or more"),
            ({"endings": [" fox"]}, "'endings' must be a list of two or more"),
            ({"endings": [" fox", "fox "]}, "'endings' must be a list of two or more different"),
            ({"endings": [" fox", " "]}, "'endings' must be a list of two or more different"),
            ({"endings": [" fox", 2]}, "'endings' must be a list of two or more different"),
            ({"answers": ["1"]}, r"must be among the options \('fox', 'dog'\)"),
        ],
    )
    def test_refuses(self, shared, scorer, change, message):
        row = {**ending("en", 1, "the quick", [" fox", " dog"], 0), **change}
        with pytest.raises(ValueError, match=message):
            evaluate(shared, "xstorycloze_endings", {"en": [row]}, scorer=scorer)

    def test_against_likelihoods_by_hand(self, shared, scorer):
        rows = {"en": [ending("en", id, *story, 0) for id, story in enumerate(STORIES)]}
        found = evaluate(shared, "xstorycloze_endings", rows, scorer=scorer)
        for i, (story, endings) in enumerate(STORIES):
            totals = [by_hand(shared, story, text)[0] for text in endings]
            rates = [t / (len(text) - 1) for t, text in zip(totals, endings, strict=True)]
            assert found.scores["accuracy"]["en"][i] == (np.argmax(totals) == 0)
            assert found.scores["accuracy_per_character"]["en"][i] == (np.argmax(rates) == 0)
            assert found.predictions["en"][i] == endings[int(np.argmax(totals))].strip()
            # nll is of the right ending with its end token, as training has it
            total, tokens = by_hand(shared, story, endings[0], with_end=True)
            assert found.scores["nll"]["en"][i] == pytest.approx(-total / tokens, abs=1e-4)

    def test_the_length_makes_the_difference(self, shared):
        # gold, then endings of 2 and 20 characters: -3 > -10, yet -1.5 < -0.5 a character
        row = ending("en", 1, "A.", [" ab", " " + "c" * 20], 1)
        canned = CannedScorer(shared, lambda number, *_: (-1.0, -3.0, -10.0)[number])
        found = evaluate(shared, "xstorycloze_endings", {"en": [row]}, scorer=canned)
        assert found.mean() == {"en": 0.0}
        assert found.mean("accuracy_per_character") == {"en": 1.0}

    @pytest.mark.thorough("None")
    @pytest.mark.parametrize("template", [None, "llama3"])
    def test_what_is_scored_is_the_story_with_its_ending(self, template):
        model = make(template=template)
        canned = CannedScorer(model)
        endings = [" fox", " dog", "!"]
        rows = {"en": [ending("en", 1, "the quick", endings, 1)]}
        evaluate(model, "xstorycloze_endings", rows, scorer=canned)
        tokenizer = model.tokenizer
        for (context, rest), text in zip(canned.requests[1:], endings, strict=True):
            assert context[0] == tokenizer.start_token_id
            # no template: it reads on
            assert tokenizer.detokenize(context[1:] + rest) == "the quick" + text
            assert rest

    def test_the_english_story_where_an_intervention_reads_it(self):
        model = make(intervention=keras_cc.XTransplant(0, 1))
        canned = CannedScorer(model)
        rows = {name: [ending(name, 1, "tilki", [" evet", " yok"], 0)] for name in ("en", "tr")}
        rows["en"][0]["instruction"] = "the fox"
        evaluate(model, "xstorycloze_endings", rows, scorer=canned)
        tokenizer = model.tokenizer
        story = [tokenizer.start_token_id, *tokenizer.tokenize("the fox")]
        # The gold endings, then two endings a row; an English row has no pivot.
        assert canned.pivots == [None, story, None, None, story, story]


class Generation:
    """Stands in for `CCCausalLM.generate`: notes the calls, answers by `say`."""

    def __init__(self, monkeypatch, say):
        self.calls = []

        def generate(model, prompts, max_length, *, strip_prompt, pivot_prompts=None):
            assert strip_prompt
            self.calls.append((list(prompts), max_length, pivot_prompts))
            return [say[prompt] for prompt in prompts]

        monkeypatch.setattr(keras_cc.CCCausalLM, "generate", generate)


ANSWERS = {
    "the quick fox": "\n \n The dog. \nthe fox",
    "a fox?": "",
    "hızlı": "ŞİLİN",
    "Kenya'nın para birimi nedir?": "Kenya şilin",
    "bir": "üç\niki",
}


class TestGenerate:
    def test_the_first_line_is_scored_against_all_answers(self, shared, monkeypatch):
        generation = Generation(monkeypatch, ANSWERS)
        canned = CannedScorer(shared)
        found = evaluate(shared, "xquad", QUESTIONS, scorer=canned, batch_size=2, verbose=0)
        assert found.predictions["en"] == ["The dog.", ""]
        assert found.predictions["tr"] == ["ŞİLİN", "Kenya şilin", "üç"]
        assert found.scores["exact_match"]["en"].tolist() == [1, 0]
        assert found.scores["exact_match"]["tr"].tolist() == [1, 0, 0]
        assert found.scores["f1"]["tr"] == pytest.approx([1, 2 / 3, 0])
        assert found.scores["contains"]["tr"].tolist() == [0, 1, 0]  # İ is lowered to two letters
        assert found.mean("f1")["tr"] == pytest.approx(5 / 9)
        # Every batch is as large: the last one is filled up.
        assert [len(prompts) for prompts, _, _ in generation.calls] == [2, 2, 2]
        assert {p for prompts, _, _ in generation.calls for p in prompts} == set(ANSWERS)
        assert all(pivots is None for _, _, pivots in generation.calls)

    def test_room_for_the_longest_prompt(self, shared, monkeypatch):
        generation = Generation(monkeypatch, ANSWERS)
        evaluate(shared, "cldr", QUESTIONS, scorer=CannedScorer(shared), batch_size=5, verbose=0)
        (prompts, max_length, _), *others = generation.calls
        longest = max(map(len, shared.preprocessor.prompt_ids(prompts)))
        assert not others and longest + 40 <= max_length < 1.5 * (longest + 40)
        limited = CannedScorer(shared)
        limited.max_length = longest + 9
        with pytest.raises(ValueError, match=r"tr: row with id b: .* no room for 10 more"):
            evaluate(shared, "cldr", QUESTIONS, scorer=limited, max_new_tokens=10, verbose=0)

    @pytest.mark.thorough
    def test_answers_of_the_model_itself(self, shared, scorer):
        """They end after `max_new_tokens`, and are the same in other company."""
        options = {"scorer": scorer, "max_new_tokens": 6, "verbose": 0}
        alone = evaluate(shared, "mkqa", QUESTIONS, batch_size=1, **options)
        found = evaluate(shared, "mkqa", QUESTIONS, batch_size=3, **options)
        assert found.predictions == alone.predictions
        compared = 0
        for language, rows in QUESTIONS.items():
            for row, line in zip(rows, found.predictions[language], strict=True):
                (ids,) = shared.preprocessor.prompt_ids([row["instruction"]])
                text = shared.generate(
                    row["instruction"], max_length=len(ids) + 6, strip_prompt=True
                )
                lines = [part.strip() for part in text.splitlines() if part.strip()]
                if "\ufffd" not in text:  # half a character has no tokens of its own
                    assert line == (lines or [""])[0]
                    compared += bool(lines)
        assert compared

    def test_cut_after_so_many_tokens(self, shared, monkeypatch):
        say = {**ANSWERS, "bir": "the fox", "hızlı": "fox ş"}
        Generation(monkeypatch, say)
        found = evaluate(
            shared, "mkqa", QUESTIONS, scorer=CannedScorer(shared), max_new_tokens=5, verbose=0
        )
        # By hand: "the", " ", "f", "o", "x", and "f", "o", "x", " ", half of "ş".
        assert found.predictions["tr"][2] == "the fox"
        assert found.predictions["tr"][0] == "fox"
        assert found.predictions["tr"][1] == "Kenya"

    def test_the_pivot_where_an_intervention_reads_it(self, monkeypatch):
        model = make(intervention=keras_cc.XTransplant(0, 1))
        generation = Generation(monkeypatch, ANSWERS)
        canned = CannedScorer(model)
        evaluate(model, "mkqa", QUESTIONS, scorer=canned, batch_size=8, verbose=0)
        ((prompts, _, pivots),) = generation.calls
        by_prompt = dict(zip(prompts, pivots, strict=True))
        assert by_prompt["bir"] == "the quick fox"
        assert by_prompt["a fox?"] is None  # an English row has none
        assert canned.pivots[:2] == [None, None]
        assert canned.pivots[2:] == model.preprocessor.prompt_ids(["the quick fox"] * 3)

    def test_real_answers_with_a_pivot(self):
        model = make(intervention=keras_cc.XTransplant(0, 1))
        rows = {"tr": QUESTIONS["tr"][:1]}
        found = evaluate(model, "mkqa", rows, batch_size=1, max_new_tokens=2, verbose=0)
        assert len(found.predictions["tr"]) == 1

    def test_numbers(self, shared, monkeypatch):
        rows = {"de": [question("de", n, f"frage {n}", "1500") for n in range(2)]}
        Generation(monkeypatch, {"frage 0": "Es sind 3 mal 500, also 1.500 €", "frage 1": "1500.5"})
        found = evaluate(shared, "mgsm", rows, scorer=CannedScorer(shared), verbose=0)
        assert found.scores["number"]["de"].tolist() == [1, 0]

    def test_answers_must_not_depend_on_chance(self):
        model = make(sampler="top_k")
        with pytest.raises(ValueError, match='sampler="greedy"'):
            evaluate(model, "mkqa", QUESTIONS, verbose=0)


class TestResult:
    def test_ids_that_do_not_go_across_languages(self, shared, monkeypatch):
        Generation(monkeypatch, ANSWERS)
        found = evaluate(shared, "xlsum", QUESTIONS, scorer=CannedScorer(shared), verbose=0)
        assert found.items == {"en": ["en/a", "en/b"], "tr": ["tr/a", "tr/b", "tr/c"]}

    def test_interval(self):
        scores = {"accuracy": {"en": np.array([1.0, 0.0]), "tr": np.array([0.0, 1.0])}}
        same = TaskResult(get("xnli"), {"en": ["1", "2"], "tr": ["1", "2"]}, scores, {})
        other = TaskResult(get("xnli"), {"en": ["1", "2"], "tr": ["3", "4"]}, scores, {})
        assert (same.interval().low, same.interval().high) == (0.5, 0.5)
        assert other.interval().low < 0.5 == other.interval().mean
        assert same.mean() == {"en": 0.5, "tr": 0.5}
        with pytest.raises(ValueError, match="`metric` must be one of"):
            same.mean("f1")

    def test_limit(self, shared):
        canned = CannedScorer(shared)
        found = evaluate(shared, "xstorycloze", CHOICES, scorer=canned, limit=1)
        assert found.items == {"en": ["1"], "tr": ["1"]}
        assert len(canned.requests) == 2 * (1 + 2)

    def test_a_row_that_is_longer_than_in_training_is_scored_whole_and_counted(self):
        model = make(max_length=20)
        with pytest.warns(UserWarning, match="2 of 2 rows have more tokens than max_length=20"):
            found = evaluate(model, "xstorycloze", {"en": CHOICES["en"]}, verbose=0)
        total, tokens = by_hand(model, CHOICES["en"][0]["instruction"], "1", with_end=True)
        assert found.scores["nll"]["en"][0] == pytest.approx(-total / tokens, abs=1e-4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"output": "4", "answers": ["4"]}, "en: row with id 1: the answers must be among"),
            ({"answers": "1"}, "en: row with id 1: 'answers' must be a list"),
            ({"id": None}, "en: row 0: no 'id'"),
            ({"output": " "}, "en: row with id 1: 'output' is empty"),
            ({"instruction": None}, "en: row with id 1: no 'instruction'"),
        ],
    )
    def test_rows(self, shared, scorer, change, message):
        rows = {"en": [{**CHOICES["en"][0], **change}]}
        with pytest.raises(ValueError, match=message):
            evaluate(shared, "xstorycloze", rows, scorer=scorer)

    def test_without_answers_the_output_is_the_only_one(self, shared):
        rows = [{k: v for k, v in row.items() if k != "answers"} for row in CHOICES["en"]]
        canned = CannedScorer(shared, lambda number, *_: -float(number))
        found = evaluate(shared, "xstorycloze", {"en": rows}, scorer=canned)
        assert found.scores["accuracy"]["en"].tolist() == [1.0, 0.0]

    @pytest.mark.parametrize(
        "options",
        [{"limit": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"limit": True}, {"limit": 2.5}],
    )
    def test_options(self, shared, scorer, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1"):
            evaluate(shared, "xstorycloze", CHOICES, scorer=scorer, **options)

    def test_no_rows(self, shared, scorer):
        for rows in ({}, CHOICES["en"]):
            with pytest.raises(ValueError, match="`rows` must be a dict from language"):
                evaluate(shared, "xstorycloze", rows, scorer=scorer)
        with pytest.raises(ValueError, match="at least one row"):
            evaluate(shared, "xstorycloze", {"en": []}, scorer=scorer)

    def test_a_scorer_of_another_model(self, shared):
        with pytest.raises(ValueError, match="`scorer` must be of this model"):
            evaluate(shared, "xstorycloze", CHOICES, scorer=CannedScorer(make()))

    def test_a_scorer_with_another_preprocessor_generates_nothing(self, shared):
        other = keras_cc.CCPreprocessor(
            shared.preprocessor.preprocessor, template="Q: {instruction}"
        )
        scorer = Scorer(shared, other, verbose=0)
        with pytest.raises(ValueError, match="`scorer` must have the model's own preprocessor"):
            evaluate(shared, "mkqa", QUESTIONS, scorer=scorer, verbose=0)

    def test_without_a_preprocessor(self):
        stock = tiny.causal_lm("llama3")
        with pytest.raises(ValueError, match="`model` needs a preprocessor"):
            evaluate(keras_cc.CCCausalLM(stock, None), "xstorycloze", CHOICES)
