"""Pairs of prompts without an answer: they align, they carry no task, and nobody is surprised."""

import connected
import keras
import numpy as np
import pytest
import tiny
import tiny_tokenizers
from connected import QUICK

import keras_cc
from keras_cc import (
    DFT,
    CCCausalLM,
    CCPreprocessor,
    Contrastive,
    FusedConnection,
    SelfDistillation,
)
from keras_cc.data.batches import PreparedBatches

TOKENIZER = tiny_tokenizers.llama3_tokenizer()


def row(number, answer=None, lang="sw"):
    made = {
        "instruction": f"{number}? " + "Kenya " * (2 + number % 3),
        "output": answer,
        "instruction_en": "What " * (2 + number % 4),
        "lang": lang,
        "id": f"r{number}",
    }
    if lang == "en":
        del made["instruction_en"]
    return made


ANSWERED = [row(0, "dog"), row(1, "dog dog dog"), row(2, "dog", lang="en"), row(3, "dog dog")]
UNANSWERED = [row(4), row(5), row(6), row(7)]
MIXED = [row for both in zip(ANSWERED, UNANSWERED, strict=True) for row in both]
LAMBDA = 0.7


def preprocessor(**options):
    return CCPreprocessor(TOKENIZER, 64, **options)


def model(connection="fused", objectives=(), rate=0.0, accumulate=None):
    if connection == "fused":
        connection = FusedConnection(dropout=0.0, alignment_loss_weight=LAMBDA)
    causal_lm = tiny.causal_lm("llama3", vocabulary_size=TOKENIZER.vocabulary_size())
    made = CCCausalLM(causal_lm, connection, objectives, preprocessor=preprocessor())
    connected.train_connection(made)
    made.compile(keras.optimizers.SGD(rate, gradient_accumulation_steps=accumulate), **QUICK)
    return made


def fit(made, rows, batch_size=8, **options):
    options = {"shuffle": False, "verbose": 0, **options}
    history = made.fit(rows, batch_size=batch_size, **options).history
    return {name: values[-1] for name, values in history.items()}


# ---------------------------------------------------------------- what such a row is


@pytest.mark.once
@pytest.mark.parametrize("missing", ["None", "left out", "no column", "empty bytes"])
def test_the_row_ends_with_its_prompt(missing):
    rows = [dict(one) for one in (UNANSWERED if missing == "no column" else MIXED)]
    for one in rows:
        if one["output"] is None and missing == "empty bytes":
            one["output"] = b""
        elif one["output"] is None and missing != "None":
            del one["output"]
    made = preprocessor()
    x, _, weight = made(rows)
    for i, one in enumerate(rows):
        real = x["token_ids"][i][x["padding_mask"][i] != 0].tolist()
        (prompt,) = made.prompt_ids([one["instruction"]])
        if one.get("output"):
            assert len(real) > len(prompt) and weight[i].any()
        else:
            assert real == prompt
            assert not weight[i].any() and not x["answer_mask"][i].any()
            (pivot,) = made.prompt_ids([one["instruction_en"]])
            assert x["pivot_token_ids"][i][x["pivot_padding_mask"][i] != 0].tolist() == pivot
    assert made.row_count == len(rows)


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_en": None}, "id r4: no 'output', and no prompt in the pivot's language"),
        ({"lang": "en"}, "id r4: no 'output', and no prompt in the pivot's language"),
        ({"output": ""}, "id r4: 'output' is empty"),
        ({"output": " "}, "id r4: 'output' is empty"),
    ],
)
def test_what_is_no_such_row(change, message):
    with pytest.raises(ValueError, match=message):
        preprocessor()([MIXED[0], {**row(4), **change}])


@pytest.mark.once
def test_no_column_of_answers_and_no_pivot_is_the_error_it_was():
    with pytest.raises(ValueError, match="no column 'output'"):
        preprocessor()([{"instruction": "a"}])


# ---------------------------------------------------------------- the losses


def test_the_task_is_that_of_the_answered_rows_and_the_alignment_that_of_all_pairs():
    made = model()
    losses = fit(made, MIXED)
    alone = fit(made, ANSWERED)
    assert losses["sft_loss"] == pytest.approx(alone["sft_loss"], rel=1e-5)
    errors = tokens = 0.0
    for one in MIXED:  # the alignment row by row: nothing of another row is in it
        if one["lang"] != "en":
            x, _, _ = made.preprocessor([one])
            out = made({name: keras.ops.convert_to_tensor(value) for name, value in x.items()})
            errors += keras.ops.convert_to_numpy(out["alignment_error"])[0]
            tokens += keras.ops.convert_to_numpy(out["alignment_tokens"])[0]
    assert losses["alignment_loss"] == pytest.approx(errors / tokens, rel=1e-4)
    expected = alone["sft_loss"] + LAMBDA * errors / tokens
    assert losses["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", [DFT(), Contrastive(alternating=False)], ids=["dft", "nce"])
def test_objectives_count_them(objective):
    # What is compared are prompts, and an answer comes after its prompt.
    answered = [{**one, "output": one["output"] or "dog"} for one in MIXED]
    name = f"{objective.name}_loss"
    made = model(None, objective)
    assert fit(made, MIXED)[name] == pytest.approx(fit(made, answered)[name], rel=1e-5)


def test_an_accumulated_group_is_the_whole_batch():
    rows = [*ANSWERED, *UNANSWERED]  # the second micro-batch has no answer at all
    whole, parts = model(rate=0.1), model(rate=0.1, accumulate=2)
    fit(whole, rows)
    fit(parts, rows, batch_size=4)
    for one, other in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_group_may_close_over_the_end_of_an_epoch():
    # Then the next epoch's first batch, the one with answers, is made in this one.
    made = model(rate=0.1, accumulate=2)
    losses = fit(made, [*ANSWERED[:2], *UNANSWERED], batch_size=2, epochs=2)
    assert losses["sft_loss"] > 0


def test_a_batch_without_any_answer_trains_the_transform_alone():
    made = model(rate=0.1)
    before = {v.path: np.array(v) for v in made.trainable_variables}
    first = fit(made, [*ANSWERED, *UNANSWERED], batch_size=4, steps_per_epoch=1)
    moved = {v.path: np.array(v) for v in made.trainable_variables}
    assert first["sft_loss"] > 0 and any((before[p] != moved[p]).any() for p in before)
    fit(made, [*UNANSWERED, *ANSWERED], batch_size=4, steps_per_epoch=1)
    changed = {v.path for v in made.trainable_variables if (np.array(v) != moved[v.path]).any()}
    # `alignment_gradient="transform"`, the default: the error trains nothing else.
    assert changed and all("transform_matrix" in path for path in changed)


@pytest.mark.filterwarnings("ignore:.*transforms are not determined")
@pytest.mark.parametrize("connection", ["fused", "selected"])
def test_fit_transform_learns_from_prompts_alone(connection):
    found = []
    for rows in (UNANSWERED, [{**one, "output": "dog"} for one in UNANSWERED]):
        made = model(connection)
        fits = made.fit_transform(rows, positions="last", ridge=0.1, verbose=0)
        found.append({name: one.matrix for name, one in fits.items()})
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("connection", "says"),
    [
        (None, "plain fine-tuning"),
        ("selected", "SelectedConnection"),
        (FusedConnection(transform=None), "FusedConnection"),
        (FusedConnection(alignment_loss_weight=0), "FusedConnection"),
    ],
    ids=["plain", "selected", "no transform", "no weight"],
)
def test_a_method_without_a_use_for_them_refuses_them_by_name(connection, says):
    made = model(connection)
    before = made.get_weights()
    with pytest.raises(ValueError, match=rf"r4: no answer, and {says}.*Received: 4 such rows"):
        fit(made, MIXED)
    with pytest.raises(ValueError, match=rf"r4: no answer, and {says}.*Received: 1 such row"):
        fit(made, lambda: iter(MIXED), batch_size=2)  # a stream: when the row comes
    for one, other in zip(before, made.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_objective_that_reads_answers_alone_refuses_them():
    made = model(None, SelfDistillation("pivot"))
    with pytest.raises(ValueError, match=r"r4: no answer, and SelfDistillation.*4 such rows"):
        fit(made, MIXED)
    fit(model("fused", SelfDistillation("pivot")), MIXED)  # beside an alignment loss they count


def test_scores_need_answers():
    made = model()
    with pytest.raises(ValueError, match="r4: no answer, and an evaluation"):
        made.evaluate(MIXED)
    with pytest.raises(ValueError, match="r4: no answer, and an evaluation"):
        fit(made, ANSWERED, validation_data=MIXED)
    made = model(None)
    made.intervention = keras_cc.XTransplant(0, 0)
    with pytest.raises(ValueError, match="r4: no answer, and a search"):
        keras_cc.search(made, MIXED, {"source_layer": [0, 1]}, verbose=0)


def test_only_such_rows():
    made = model()
    with pytest.raises(ValueError, match=r"No row has an answer.*Received: 4 rows"):
        fit(made, UNANSWERED)
    with pytest.raises(ValueError, match=r"No row has an answer.*Received: 4 rows"):
        fit(made, lambda: iter(UNANSWERED), batch_size=2)


# ---------------------------------------------------------------- sources


def _tensorflow():
    tf = pytest.importorskip("tensorflow")
    columns = {name: [one.get(name) or "" for one in MIXED] for name in MIXED[0]}
    return tf.data.Dataset.from_tensor_slices(columns).batch(4)


def _grain():
    return pytest.importorskip("grain").MapDataset.source(MIXED)


def _torch():
    data = pytest.importorskip("torch.utils.data")
    return data.DataLoader(MIXED, batch_size=4, collate_fn=list)


class _Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return MIXED[4 * index : 4 * index + 4]


SOURCES = {
    "rows": lambda: MIXED,
    "columns": lambda: {name: [one.get(name) for one in MIXED] for name in MIXED[0]},
    "arrays": lambda: preprocessor()(MIXED),
    "generator": lambda: iter(MIXED),
    "function": lambda: lambda: iter(MIXED),
    "tf.data": _tensorflow,
    "grain": _grain,
    "torch": _torch,
    "PyDataset": _Sequence,
}


@pytest.mark.once
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_may_mix_them(kind):
    expected_x, _, expected = preprocessor()(MIXED)
    batches = PreparedBatches(SOURCES[kind](), preprocessor(), 4, answers="some")
    answers, prompts = [], []
    for x, _, weight in batches:
        answers += weight.sum(axis=1).tolist()
        prompts += x["padding_mask"].sum(axis=1).tolist()
    assert answers == expected.sum(axis=1).tolist()
    assert prompts == expected_x["padding_mask"].sum(axis=1).tolist()
    assert (batches.row_count, batches.unanswered_count) == (8, 4)


def test_they_are_counted_and_said(capsys):
    made = model()
    fit(made, MIXED, verbose=2)
    said = capsys.readouterr().out
    assert said.startswith("4 of 8 rows have no answer: pairs of prompts to align\n")
    fit(made, lambda: iter(MIXED), batch_size=4, verbose=2)
    assert "4 of the 8 rows so far had no answer" in capsys.readouterr().out
    fit(made, ANSWERED, verbose=2)
    assert "no answer" not in capsys.readouterr().out
