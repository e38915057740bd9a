"""`Consistency`: both divergences against NumPy, who learns, own answers, code-switched prompts."""

import keras
import numpy as np
import pytest
import test_own_answers
from backend_tools import gradients
from keras import ops
from test_self_distillation import X, by_row, fit, log_softmax, make

from keras_cc import Consistency, SelfDistillation
from keras_cc.data import code_switch
from keras_cc.training.own_answers import OwnAnswers

CONNECTIONS = [None, "fused"]
LEXICON = {"dog": "köpek", "fox": "tilki", "the": "bu"}


def symmetric(one, other, temperature=1.0):
    """tau^2 [KL(q || p) + KL(p || q)] = tau^2 sum_v (q - p)(log q - log p), over tokens."""
    q, p = (log_softmax(np.asarray(logits, "float64") / temperature) for logits in (one, other))
    return temperature**2 * ((np.exp(q) - np.exp(p)) * (q - p)).sum()


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_symmetric_divergence(connection, temperature):
    model = make(Consistency(temperature, weight=0.7), connection)
    rows = list(by_row(model, "pivot"))
    total = sum(symmetric(after_pivot, own, temperature) for _, _, after_pivot, own in rows)
    expected = total / sum(len(where) for _, where, _, _ in rows)
    found = fit(model)
    assert found["consistency_loss"][0] == pytest.approx(expected, rel=2e-4)
    assert expected > 0.01
    rest = found["sft_loss"][0] + found.get("alignment_loss", [0.0])[0]
    assert found["loss"][0] == pytest.approx(rest + 0.7 * expected, rel=2e-4)


@pytest.mark.thorough("None")
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_each_side_learns_from_the_others_constant(connection):
    model = make(Consistency(), connection)
    rows = [(row, where, *map(log_softmax, both)) for row, where, *both in by_row(model, "pivot")]
    x = {name: ops.convert_to_tensor(value) for name, value in X.items()}

    def loss():
        return ops.sum(model(x, training=True)["consistency_loss"])

    def read(ids, as_english):
        """Logits of one row without padding, around the connection or through its transform."""
        inputs = {"token_ids": [ids], "padding_mask": [[1] * len(ids)]}
        if as_english:
            inputs |= {"pivot_token_ids": [[0] * 4], "pivot_padding_mask": [[0] * 4]}
        inputs = {name: ops.convert_to_tensor(np.array(v, "int32")) for name, v in inputs.items()}
        return ops.log_softmax(model(inputs, training=True)["logits"][0])

    def by_hand():
        total = 0.0
        for row, where, log_q, log_p in rows:
            ids = X["token_ids"][row][X["padding_mask"][row] == 1]
            pivot = X["pivot_token_ids"][row][X["pivot_padding_mask"][row] == 1]
            answer, length = ids[where[0] + 1 :], len(where)
            after_pivot = read([*pivot, *answer], True)[len(pivot) - 1 :][:length]
            student = read(ids, False)[where[0] :][:length]
            # Of KL(a || b) with a constant: - sum a log b.
            for constant, learner in ((log_q, student), (log_p, after_pivot)):
                constant = ops.convert_to_tensor(np.exp(constant).astype("float32"))
                total = total - ops.sum(constant * learner)
        return total

    variables = model.trainable_variables
    found, expected = gradients(loss, variables), gradients(by_hand, variables)
    for variable, one, other in zip(variables, found, expected, strict=True):
        if "decision_gate" in variable.path:
            assert not np.any(one), variable.path
        else:
            np.testing.assert_allclose(one, other, atol=3e-5, err_msg=variable.path)
            assert np.abs(one).max() > 1e-5, variable.path
    # English learns too: one-sided, the gradient is another.
    one_sided = make(SelfDistillation("pivot"), connection)
    other = gradients(
        lambda: ops.sum(one_sided(x, training=True)["self_distillation_loss"]),
        one_sided.trainable_variables,
    )
    assert max(np.abs(a - b).max() for a, b in zip(found, other, strict=True)) > 1e-2


def expected_loss(made, packed):
    """The loss of packed rows that have an answer, one by one in NumPy."""
    numpy_model, total, tokens = test_own_answers.reference(made), 0.0, 0
    for one in packed:
        prompt, answer = one.ids[: one.prompt_length], one.ids[one.prompt_length :]
        q = numpy_model.stock(np.array([*one.pivot, *answer]))[len(one.pivot) - 1 : -1]
        p = numpy_model.monolingual(np.array([*prompt, *answer]))[len(prompt) - 1 : -1]
        total += symmetric(q, p)
        tokens += len(answer)
    return total / tokens


def test_own_answers_are_those_after_the_pivot(monkeypatch):
    made = test_own_answers.model(Consistency(refresh=1))
    seen = []

    def say(self, keys):
        seen.append(self._teacher)
        return [test_own_answers.said_of(prompt) for prompt, _ in keys]

    monkeypatch.setattr(OwnAnswers, "_answer", say)
    found = test_own_answers.fit(made)["consistency_loss"][0]
    pairs = [row for row in test_own_answers.MIXED if row["lang"] != "en"]
    answered = [
        one._replace(ids=[*one.ids, *test_own_answers.said_of(tuple(one.ids))])
        if len(one.ids) == one.prompt_length
        else one
        for one in test_own_answers.packed(made, pairs)
    ]
    assert set(seen) == {"pivot"}
    assert found == pytest.approx(expected_loss(made, answered), rel=2e-4)


def test_code_switched_prompts_of_english_rows():
    english = [
        {"instruction": "What is the dog?", "output": "yes"},
        {"instruction": "Kenya the fox", "output": "no"},
        {"instruction": "What is Kenya?", "output": "no"},  # no word that the lexicon knows
    ]
    pairs = [{**row, "instruction_en": row["instruction"], "lang": "tr"} for row in english]
    with pytest.warns(UserWarning, match="In 1 of 3 rows nothing is switched"):
        switched = code_switch(pairs, LEXICON, ratio=1)
    assert [row["instruction"] for row in switched] == [
        "What is bu köpek?", "Kenya bu tilki", "What is Kenya?"
    ]  # fmt: skip
    made = test_own_answers.model(Consistency())
    packed = test_own_answers.packed(made, switched)
    prompts = test_own_answers.packed(made, english)
    for one, plain in zip(packed, prompts, strict=True):
        assert one.pivot == plain.ids[: plain.prompt_length]
    found = test_own_answers.fit(made, [*english, *switched])
    expected = expected_loss(made, packed)
    assert found["consistency_loss"][0] == pytest.approx(expected, rel=2e-4) and expected > 0.01
    # The row that is not switched agrees with itself: it counts, and is 0.
    assert expected_loss(made, packed[2:]) == 0
    alone = test_own_answers.fit(made, switched[2:])["consistency_loss"]
    assert alone[0] == pytest.approx(0, abs=1e-6)


def test_english_rows_count_nothing():
    made = test_own_answers.model(Consistency())
    rows = [row for row in test_own_answers.MIXED if row["lang"] == "en"]
    assert test_own_answers.fit(made, rows)["consistency_loss"] == [0.0]


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` must be a number > 0"),
        ({"weight": -1}, "`weight` must be a number >= 0"),
        ({"alternating": 1}, "`alternating` must be one of"),
        ({"refresh": 0}, "`refresh` must be an integer >= 1"),
        ({"start": -1}, "`start` must be an integer >= 0"),
        ({"max_new_tokens": 1}, "`max_new_tokens` must be an integer >= 2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**options)


@pytest.mark.once
def test_options_are_kept():
    options = {"temperature": 2.0, "weight": 0.5, "alternating": True, "refresh": 3, "start": 1,
               "max_new_tokens": 5}  # fmt: skip
    objective = Consistency(**options)
    assert objective.get_config() == options
    saved = keras.saving.serialize_keras_object(objective)
    again = keras.saving.deserialize_keras_object(saved)
    assert type(again) is Consistency and again.get_config() == options
    assert (again.name, again.teacher, again.counts) == ("consistency", "pivot", "answer_tokens")
    with pytest.raises(TypeError, match="teacher"):
        Consistency(teacher="connected")
