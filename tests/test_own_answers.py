"""The model's own answers to pairs of prompts that have none: made, kept, taught, left out."""

import connected
import keras
import numpy as np
import pytest
import tiny
import tiny_tokenizers
from connected import QUICK
from keras import ops
from reference import Options, Reference

from keras_cc import CCCausalLM, CCPreprocessor, FusedConnection, SelfDistillation
from keras_cc.training import own_answers
from keras_cc.training.own_answers import OwnAnswers

TOKENIZER = tiny_tokenizers.llama3_tokenizer()
TEACHERS = [("connected", "fused"), ("in_context", "fused"), ("pivot", "fused"),
            ("in_context", None), ("pivot", None)]  # fmt: skip


def row(number, answer=None, lang="sw"):
    made = {
        "id": f"r{number}",
        "instruction": f"{number}? dog Kenya {number * 53 % 97} " + "fox " * (number % 3),
        "output": answer,
        "instruction_en": f"What is Kenya {number * 37 % 91} " + "the " * (1 + number % 3),
        "lang": lang,
    }
    if lang == "en":
        del made["instruction_en"]
    return made


PAIRS = [row(4), row(5), row(6), row(7)]
MIXED = [row(0, "dog"), PAIRS[0], row(1, "dog dog"), PAIRS[1],
         row(2, "dog", lang="en"), PAIRS[2], row(3, "dog dog"), PAIRS[3]]  # fmt: skip


def model(objective, connection=None, rate=0.0, accumulate=None, max_length=64, **options):
    if connection == "fused":
        connection = FusedConnection(dropout=0.0, initial_gate=0.5, alignment_loss_weight=0.0)
    causal_lm = tiny.causal_lm("llama3", vocabulary_size=TOKENIZER.vocabulary_size())
    preprocessor = CCPreprocessor(TOKENIZER, max_length, **options)
    made = CCCausalLM(causal_lm, connection, objective, preprocessor=preprocessor)
    connected.train_connection(made)
    made.compile(keras.optimizers.SGD(rate, gradient_accumulation_steps=accumulate), **QUICK)
    return made


def fit(made, rows=MIXED, batch_size=8, **options):
    options = {"shuffle": False, "verbose": 0, **options}
    return made.fit(rows, batch_size=batch_size, **options).history


def packed(made, rows=PAIRS):
    return made.preprocessor.pack(rows)


def stops_at(monkeypatch, *tokens):
    monkeypatch.setattr(CCPreprocessor, "stop_token_ids", property(lambda self: tuple(tokens)))


def say(monkeypatch, answers):
    """Have the model answer each prompt by what `answers` says of it, in ids."""
    monkeypatch.setattr(
        OwnAnswers, "_answer", lambda self, keys: [answers(prompt) for prompt, _ in keys]
    )


def reference(made):
    options = Options() if made.connection is not None else Options(transform=None)
    return Reference(connected.weights(made), made.num_blocks, options=options)


def greedy(made, teacher, one, length):
    """The likeliest continuation of a packed row's context, token by token, in NumPy."""
    numpy_model, said = reference(made), []
    for _ in range(length):
        if teacher == "connected":
            ids = [*one.ids, *said]
            logits = numpy_model.connected(np.array(ids), np.array(one.pivot), len(one.ids) - 1)[0]
        else:
            start = one.ids[1:] if one.ids[0] == one.pivot[0] else one.ids
            context = one.pivot if teacher == "pivot" else [*one.pivot, *start]
            logits = numpy_model.stock(np.array([*context, *said]))
        said.append(int(logits[-1].argmax()))
    return said


# ---------------------------------------------------------------- made


@pytest.mark.thorough("pivot-None")
@pytest.mark.parametrize("teacher, connection", TEACHERS)
def test_the_teacher_answers_by_what_it_reads(monkeypatch, teacher, connection):
    made = model(SelfDistillation(teacher, refresh=1, max_new_tokens=5), connection)
    rows = packed(made)
    expected = [greedy(made, teacher, one, 5) for one in rows]
    stop = next(t for said in expected for n, t in enumerate(said) if n and t not in said[:n])
    stops_at(monkeypatch, stop)
    expected = [said[: said.index(stop) + 1] if stop in said else None for said in expected]
    answers = own_answers.of(made)
    assert not answers.give(rows)[1].any()
    answers.refresh()
    given, is_own = answers.give(rows)
    for one, said, now, own in zip(rows, expected, given, is_own, strict=True):
        used = said if said and len(said) > 1 else None
        assert answers.answers[tuple(one.ids), tuple(one.pivot)] == used
        assert (now.ids, own) == ([*one.ids, *(used or ())], used is not None)
        assert now.prompt_length == len(one.ids)
    assert is_own.any()
    assert answers.unfinished == expected.count(None)


def test_a_stop_id_of_zero_is_not_what_is_yet_to_be_filled(monkeypatch):
    made = model(SelfDistillation("pivot", refresh=1, max_new_tokens=5))
    rows = packed(made)
    said = [greedy(made, "pivot", one, 5) for one in rows]
    assert not any(0 in one for one in said)
    stops_at(monkeypatch, 0, said[0][2])
    expected = [one[: one.index(said[0][2]) + 1] if said[0][2] in one else None for one in said]
    answers = own_answers.of(made)
    answers.give(rows)
    answers.refresh()
    used = [one if one and len(one) > 1 else None for one in expected]
    assert any(used)
    assert [answers.answers[tuple(one.ids), tuple(one.pivot)] for one in rows] == used


def test_what_is_of_no_use_is_left_out_and_counted(monkeypatch, capsys):
    end = TOKENIZER.end_token_id
    made = model(SelfDistillation("pivot", "labels", refresh=1), max_length=40)
    rows = packed(made)
    said = {
        tuple(rows[0].ids): [end],
        tuple(rows[1].ids): None,
        tuple(rows[2].ids): [5] * 40 + [end],
        tuple(rows[3].ids): [5, 6, end],
    }
    say(monkeypatch, said.get)
    history = fit(made, verbose=2)
    text = capsys.readouterr().out
    assert (
        "1 of 4 pairs of prompts have the model's own answer; left out: 1 empty, 1 without an "
        "end, 1 too long" in text
    )
    assert history["self_distillation_loss"][0] > 0


def test_a_row_keeps_its_answer_wherever_it_comes_from(monkeypatch):
    end = TOKENIZER.end_token_id
    made = model(SelfDistillation("pivot", "labels", refresh=1))
    answers = own_answers.of(made)
    say(monkeypatch, lambda prompt: [prompt[-1], end])
    answers.give(packed(made))
    answers.refresh()
    given, is_own = answers.give(packed(made, MIXED[::-1]))
    assert is_own.tolist() == [one["output"] is None for one in MIXED[::-1]]
    for one in given:
        assert one.ids[-1] == end
    assert [one.ids[-2] for one in given if one.ids[-2] != one.ids[one.prompt_length - 1]] == [
        one.ids[-2] for one, own in zip(given, is_own, strict=True) if not own
    ]


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_the_answers_are_made_when_they_are_due(monkeypatch, padding):
    made = model(SelfDistillation("pivot", "labels", start=3, refresh=4), padding=padding)
    steps, refresh = [], OwnAnswers.refresh

    def noted(self):
        steps.append(counter.done)
        refresh(self)

    class Counter(keras.callbacks.Callback):
        done = 0

        def on_train_batch_begin(self, batch, logs=None):
            counter.done += 1

    counter = Counter()
    monkeypatch.setattr(OwnAnswers, "refresh", noted)
    say(monkeypatch, lambda prompt: [5, TOKENIZER.end_token_id])
    fit(made, batch_size=2, epochs=3, callbacks=[counter])  # 12 steps
    assert steps == [3, 7, 11]
    steps.clear()
    fit(made, batch_size=2, callbacks=[counter])  # goes on: the answers come first
    assert steps == [12, 15]


# ---------------------------------------------------------------- taught


def expected_labels_loss(made, answers):
    """Mean nats a token of own answers in the monolingual pass, in NumPy."""
    numpy_model, total, tokens = reference(made), 0.0, 0
    for one in packed(made):
        said = answers(tuple(one.ids))
        logits = numpy_model.monolingual(np.array([*one.ids, *said]))[len(one.ids) - 1 : -1]
        total += connected.cross_entropy(logits, np.array(said)).sum()
        tokens += len(said)
    return total / tokens


def said_of(prompt):
    return [prompt[-1], *[5, 7, 9][: len(prompt) % 3], TOKENIZER.end_token_id]


@pytest.mark.parametrize("connection", [None, "fused"])
def test_labels_are_cross_entropy_on_own_answers_alone(monkeypatch, connection):
    plain = fit(model((), connection), [one for one in MIXED if one["output"]])
    made = model(SelfDistillation("pivot", "labels", refresh=1, weight=0.5), connection)
    say(monkeypatch, said_of)
    found = fit(made)
    expected = expected_labels_loss(made, said_of)
    assert found["self_distillation_loss"][0] == pytest.approx(expected, rel=2e-4)
    # The task is that of the answered rows.
    assert found["sft_loss"][0] == pytest.approx(plain["sft_loss"][0], rel=2e-4)
    assert found["loss"][0] == pytest.approx(plain["sft_loss"][0] + 0.5 * expected, rel=2e-4)


def test_the_divergence_counts_own_answers_too(monkeypatch):
    made = model(SelfDistillation("pivot", refresh=1))
    say(monkeypatch, said_of)
    found = fit(made)["self_distillation_loss"][0]
    numpy_model, total, tokens = reference(made), 0.0, 0
    for one in packed(made, [one for one in MIXED if one["lang"] != "en"]):
        answer = one.ids[one.prompt_length :] or said_of(tuple(one.ids))
        prompt = one.ids[: one.prompt_length]
        pairs = [
            numpy_model.stock(np.array([*ids, *answer]))[len(ids) - 1 : -1]
            for ids in (one.pivot, prompt)
        ]
        q, p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in pairs)
        total += (np.exp(q) * (q - p)).sum()
        tokens += len(answer)
    assert found == pytest.approx(total / tokens, rel=2e-4)


def test_what_the_teacher_is_not_sure_of_is_not_taught(monkeypatch):
    """Neither is it, in the denominator, as if it were not there."""
    losses, likely = {}, {}
    for least in (0.0, None, 1.0):
        if least is None:  # between the second and the third own answer, by their least token
            least = sum(sorted(likely.values())[1:3]) / 2
        made = model(SelfDistillation("pivot", refresh=1, least_confidence=least))
        say(monkeypatch, said_of)
        found = fit(made)["self_distillation_loss"][0]
        numpy_model, total, tokens = reference(made), 0.0, 0
        for number, one in enumerate(packed(made, [row for row in MIXED if row["lang"] != "en"])):
            is_own = len(one.ids) == one.prompt_length
            answer = said_of(tuple(one.ids)) if is_own else one.ids[one.prompt_length :]
            q, p = (
                np.log(softmax(numpy_model.stock(np.array([*ids, *answer]))[len(ids) - 1 : -1]))
                for ids in (one.pivot, one.ids[: one.prompt_length])
            )
            lowest = np.exp(q)[np.arange(len(answer)), answer].min()
            if is_own:
                likely[number] = lowest
            if not is_own or lowest >= least:
                total += (np.exp(q) * (q - p)).sum()
            tokens += len(answer)
        assert found == pytest.approx(total / tokens, rel=2e-4)
        losses[least] = found
    assert len(likely) == 4 and len(set(losses.values())) == 3


def test_rows_with_an_answer_can_be_left_to_their_own_loss(monkeypatch):
    say(monkeypatch, said_of)
    made = model(SelfDistillation("pivot", refresh=1, answered=False))
    found = fit(made)["self_distillation_loss"][0]
    numpy_model, total, tokens = reference(made), 0.0, 0
    for one in packed(made, [row for row in MIXED if row["lang"] != "en"]):
        if len(one.ids) > one.prompt_length:
            continue
        answer = said_of(tuple(one.ids))
        q, p = (
            np.log(softmax(numpy_model.stock(np.array([*ids, *answer]))[len(ids) - 1 : -1]))
            for ids in (one.pivot, one.ids)
        )
        total += (np.exp(q) * (q - p)).sum()
        tokens += len(answer)
    assert found == pytest.approx(total / tokens, rel=2e-4)


@pytest.mark.parametrize("divergence", ["forward", "labels"])
def test_where_each_row_has_an_answer_it_is_plain_fine_tuning(divergence):
    rows = [row for row in MIXED if row.get("output")]
    assert len(rows) > 2
    options = {} if divergence == "labels" else {"answered": False}
    found = []
    for objective in ((), SelfDistillation("pivot", divergence, refresh=1, **options)):
        made = model(objective, rate=0.1)
        fit(made, rows, epochs=2)
        found.append(connected.weights(made))
    connected.assert_weights_equal(*found, atol=1e-7)


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_accumulated_micro_batches_are_the_whole_batch(monkeypatch):
    say(monkeypatch, said_of)
    found = []
    for accumulate in (None, 2):
        made = model(SelfDistillation("pivot", "labels", refresh=1), None, 0.05, accumulate)
        rows = [*PAIRS[:3], *MIXED[::2], PAIRS[3]]  # three own answers, then one
        fit(made, rows, batch_size=8 if accumulate is None else 4)
        found.append(connected.weights(made))
    connected.assert_weights_equal(*found, atol=2e-6)


def test_rows_of_a_stream_have_answers_once_they_were_seen(monkeypatch):
    say(monkeypatch, said_of)
    made = model(SelfDistillation("pivot", "labels", refresh=1))
    # A trainer may have read a batch or two ahead of the answers.
    found = fit(made, lambda: iter(MIXED), epochs=5, steps_per_epoch=1)
    assert found["self_distillation_loss"][0] == 0.0
    assert found["self_distillation_loss"][-1] == pytest.approx(
        expected_labels_loss(made, said_of), rel=2e-4
    )


def test_training_on_own_answers_teaches_them(monkeypatch):
    say(monkeypatch, said_of)
    made = model(SelfDistillation("pivot", "labels", refresh=50), rate=0.5)
    found = fit(made, epochs=15)["self_distillation_loss"]
    assert found[-1] < 0.7 * found[0]


# ---------------------------------------------------------------- refused


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "labels"}, "`divergence` can be 'labels' with `refresh`"),
        ({"divergence": "labels", "refresh": 2, "temperature": 2.0}, "`divergence` can be 'lab"),
        ({"least_confidence": 2}, "`least_confidence` must be a number"),
        (
            {"divergence": "labels", "refresh": 2, "least_confidence": 0.5},
            "`least_confidence` must be 0 for 'labels'",
        ),
        ({"answered": 1, "refresh": 2}, "`answered` must be"),
        ({"answered": False}, "`answered` can be False with `refresh` alone"),
        ({"refresh": 0}, "`refresh` must be an integer >= 1"),
        ({"start": -1}, "`start` must be an integer >= 0"),
        ({"max_new_tokens": 1}, "`max_new_tokens` must be an integer >= 2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillation("pivot", **options)


@pytest.mark.once
def test_two_teachers_do_not_answer_one_row():
    class Other(SelfDistillation):
        name = "other"

    made = model([SelfDistillation("pivot", refresh=1), Other("in_context", refresh=1)])
    with pytest.raises(ValueError, match="One objective may have the model answer"):
        fit(made)


@pytest.mark.once
def test_arrays_are_refused():
    made = model(SelfDistillation("pivot", refresh=1))
    x, y, weight = made.preprocessor(MIXED)
    with pytest.raises(ValueError, match="given to rows of text"):
        made.fit(x, y, sample_weight=weight, batch_size=8, verbose=0)


@pytest.mark.once
def test_a_failed_refresh_leaves_the_sampler_as_it_was(monkeypatch):
    made = model(SelfDistillation("pivot", refresh=1))
    before = getattr(made.causal_lm, "sampler", None)
    monkeypatch.setattr(OwnAnswers, "_answer", lambda self, keys: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(made)
    assert getattr(made.causal_lm, "sampler", None) is before
    assert ops.shape(made(made.preprocessor(MIXED)[0])["logits"])[0] == len(MIXED)


# ---------------------------------------------------------------- asked in turn


def in_turn(monkeypatch, practice=0.5, **options):
    """A model whose answer to any prompt is how long it is, in one token and the end."""
    made = model(SelfDistillation("in_turn", "labels", refresh=1, practice=practice), **options)
    end = TOKENIZER.end_token_id
    monkeypatch.setattr(
        OwnAnswers, "_continued", lambda self, some, pivots=None: [[len(c), end] for c in some]
    )
    return made, own_answers.of(made), end


def test_english_first_then_the_other_language(monkeypatch):
    _, answers, end = in_turn(monkeypatch)
    rows = packed(model(SelfDistillation("pivot", "labels", refresh=1)), MIXED)
    answers.give(rows)
    answers.refresh()  # in English
    said = {tuple(one.pivot): [len(one.pivot), end] for one in rows if one.pivot}
    assert answers.said == said
    assert set(answers.answers.values()) == {None}  # it is to be practised first
    answers.refresh()
    unanswered = [one for one in rows if len(one.ids) == one.prompt_length]
    assert len(unanswered) == len(answers.answers) == len(PAIRS)
    for one in unanswered:
        # The English prompt, what it was answered, and the prompt without a second start token.
        context = len(one.pivot) + 2 + len(one.ids) - int(one.ids[0] == one.pivot[0])
        assert answers.answers[tuple(one.ids), tuple(one.pivot)] == [context, end]


@pytest.mark.parametrize("practice", [0.0, 0.5, 1.0])
def test_a_share_of_the_answered_rows_practises(monkeypatch, practice):
    made, answers, end = in_turn(monkeypatch, practice)
    rows = packed(made, [row(n, "dog") for n in range(3)] + [row(9, "dog", lang="en"), *PAIRS[:1]])
    assert answers.give(rows)[0] == rows  # nothing has been said yet
    answers.refresh()
    given = [answers.give(rows) for _ in range(2)]
    assert not any(is_own.any() for _, is_own in given)
    practised = 0
    for now, _ in given:
        assert now[3:] == rows[3:]  # English has no pivot, and the last row no answer
        for one, other in zip(rows[:3], now[:3], strict=True):
            if other == one:
                continue
            practised += 1
            start = int(one.ids[0] == one.pivot[0])
            said = [*one.pivot, len(one.pivot), end]
            assert other.ids == [*said, *one.ids[start:]] and other.pivot == []
            answer = one.ids[one.prompt_length :]
            assert other.ids[other.prompt_length :] == answer  # which alone is learnt
    assert practised == 6 * practice


def test_what_has_no_room_does_not_practise(monkeypatch):
    made, answers, _ = in_turn(monkeypatch, 1.0, max_length=24)
    rows = packed(made, [row(n, "dog") for n in range(3)])
    answers.give(rows)
    answers.refresh()
    assert answers.give(rows)[0] == rows


def test_no_answer_is_older_than_the_last_refresh(monkeypatch):
    made, answers, _ = in_turn(monkeypatch)
    answers.give(packed(made))
    answers.refresh(), answers.refresh()
    assert None not in answers.answers.values()
    monkeypatch.setattr(
        OwnAnswers, "_continued", lambda self, some, pivots=None: [None] * len(some)
    )
    answers.refresh()  # nothing in English, so there is nothing to ask behind it
    assert set(answers.answers.values()) == {None}
    assert answers.unfinished == len(PAIRS)


def test_only_what_was_answered_in_english_is_asked(monkeypatch):
    made, answers, end = in_turn(monkeypatch)
    monkeypatch.setattr(
        OwnAnswers,
        "_continued",
        lambda self, some, pivots=None: [[None, [end], [7, end]][n % 3] for n in range(len(some))],
    )
    rows = packed(made, [row(n, "dog" if n % 2 else None) for n in range(6)])
    answers.give(rows), answers.refresh(), answers.refresh()
    kept = [key for key, answer in answers.answers.items() if answer is not None]
    assert all(answers.said[pivot] for _, pivot in kept)


def test_in_turn_trains_and_says_what_it_has(capsys):
    made = model(SelfDistillation("in_turn", "labels", refresh=1, max_new_tokens=4), rate=0.01)
    history = fit(made, MIXED * 2, batch_size=8, epochs=2, verbose=2)
    assert np.isfinite(history["loss"]).all()
    assert "pairs of prompts have the model's own answer" in capsys.readouterr().out


def test_in_turn_is_for_labels():
    with pytest.raises(ValueError, match=r"`divergence` must be 'labels'.*Received: .*forward"):
        SelfDistillation("in_turn", refresh=1)
