"""Padded to what is needed: the same losses as at `max_length`, and little to compile."""

import collections
import warnings

import connected
import keras
import numpy as np
import pytest
import tiny
import tiny_tokenizers

from keras_cc import CCCausalLM, CCPreprocessor, FusedConnection, Incline
from keras_cc.data.batches import PreparedBatches
from keras_cc.passes import runs

TOKENIZER = tiny_tokenizers.llama3_tokenizer()


def row(number, words, pivot_words=3, answer=1):
    return {
        "instruction": f"{number}? " + "Kenya " * words,
        "output": "dog " * answer,
        "instruction_en": "What " * pivot_words,
        "lang": "sw",
        "id": str(number),
    }


# Lengths from a few tokens to a hundred and more, in no order.
ROWS = [row(n, 1 + n * 7 % 23, 1 + n * 5 % 11, 1 + n % 4) for n in range(26)]
ENGLISH = [{**row(n, 4), "lang": "en"} for n in range(4)]


def preprocessor(padding, max_length=256, **options):
    return CCPreprocessor(TOKENIZER, max_length, padding=padding, **options)


def model(padding, connection="fused"):
    keras.utils.set_random_seed(7)
    causal_lm = tiny.causal_lm("llama3", vocabulary_size=TOKENIZER.vocabulary_size())
    made = CCCausalLM(causal_lm, connection, preprocessor=preprocessor(padding))
    made.compile(keras.optimizers.SGD(0.02), **connected.QUICK)
    return made


def real_rows(batches):
    """From row number to what is not padding, over all batches; each must come once."""
    found = {}
    for x, y, weight in batches:
        for i, number in enumerate(x["row_ids"].tolist()):
            assert number not in found
            real = x["padding_mask"][i] != 0
            pivot = x["pivot_token_ids"][i][x["pivot_padding_mask"][i] != 0]
            window = x["answer_positions"][i]
            # All of the answer is inside the window, which is inside the row.
            assert weight[i].sum() == weight[i][window].sum()
            assert not weight[i][~real].any()
            found[number] = (
                x["token_ids"][i][real].tolist(),
                pivot.tolist(),
                y[i][weight[i] != 0].tolist(),
            )
    return found


def test_a_batch_takes_the_smallest_width_that_holds_it():
    longest = preprocessor("longest", 200, pivot_max_length=100)
    static = preprocessor("max_length", 200, pivot_max_length=100)
    for rows in (ROWS[:1], ROWS[3:6], ROWS):
        x, y, weight = longest(rows)
        whole, whole_y, whole_weight = static(rows)
        target = whole["padding_mask"].sum(axis=1).max()
        pivot = whole["pivot_padding_mask"].sum(axis=1).max()
        ladder = [16, 24, 32, 48, 64, 96, 128, 192, 200]
        width = min(n for n in ladder if n >= target)
        pivot_width = min(n for n in [*ladder[:6], 100] if n >= pivot)
        assert x["token_ids"].shape == y.shape == weight.shape == (len(rows), width)
        assert x["pivot_token_ids"].shape == (len(rows), pivot_width)
        for name, value in x.items():
            np.testing.assert_array_equal(value, whole[name][:, : value.shape[1]], err_msg=name)
        np.testing.assert_array_equal(y, whole_y[:, :width])
        np.testing.assert_array_equal(weight, whole_weight[:, :width])
        assert whole["token_ids"].shape == (len(rows), 200)
        assert whole["pivot_token_ids"].shape == (len(rows), 100)


def test_without_any_pivot_its_width_is_the_smallest():
    x, _, _ = preprocessor("longest")(ENGLISH)
    assert x["pivot_token_ids"].shape == (4, 16)
    assert not x["pivot_padding_mask"].any()
    assert preprocessor("longest").pivot_preprocess(["", None])["pivot_token_ids"].shape == (2, 16)


def test_own_widths():
    x, _, _ = preprocessor("longest", widths=[40, 256])(ROWS[:1])
    assert x["token_ids"].shape == (1, 40)
    x, _, _ = preprocessor("longest", 50, widths=[40, 256])([row(0, 6)])
    assert x["token_ids"].shape[1] in (40, 50)


@pytest.mark.parametrize("widths", [[], [16, 255], [32, 16, 256], [16, 16, 256], [0, 256], [1.5]])
def test_a_ladder_must_ascend_and_reach_the_longest(widths):
    with pytest.raises(ValueError, match=r"`widths` must be"):
        preprocessor("longest", widths=widths)
    with pytest.raises(ValueError, match=r"300 here.*Received: widths=\[16, 256\]"):
        preprocessor("longest", pivot_max_length=300, widths=[16, 256])


def test_an_unknown_padding_is_refused():
    with pytest.raises(ValueError, match=r"`padding` must be one of.*padding='long'"):
        preprocessor("long")


def test_a_row_beyond_max_length_is_refused_as_ever():
    with pytest.raises(ValueError, match=r"Answers are never cut.*max_length=32"):
        preprocessor("longest", 32)([row(0, 1, answer=40)])
    with pytest.raises(ValueError, match=r"pivot_max_length=16"):
        preprocessor("longest", 256, pivot_max_length=16)([row(0, 1, pivot_words=30)])


def test_options_are_in_the_config():
    made = preprocessor("max_length", widths=[64, 256])
    again = CCPreprocessor.from_config(made.get_config())
    assert (again.padding, again.widths) == ("max_length", [64, 256])
    old = {k: v for k, v in made.get_config().items() if k not in ("padding", "widths")}
    assert CCPreprocessor.from_config(old).padding == "longest"


@pytest.mark.parametrize("shuffle", [False, True])
def test_grouped_batches_hold_every_row_once(shuffle):
    prepare = preprocessor("longest")
    batches = PreparedBatches(ROWS, prepare, 4, shuffle=shuffle, seed=3, group=True)
    seen = list(batches)
    expected = real_rows(PreparedBatches(ROWS, preprocessor("max_length"), 4))
    assert real_rows(seen) == expected
    assert [len(y) for _, y, _ in seen] == [4] * 6 + [2]
    assert prepare.row_count == len(ROWS)


def test_grouped_batches_have_less_padding_and_orders_are_seeded():
    def passes(seed, group=True, number=1):
        prepared = preprocessor("longest")
        batches = PreparedBatches(ROWS, prepared, 4, shuffle=True, seed=seed, group=group)
        ids = [[x["row_ids"].tolist() for x, _, _ in batches] for _ in range(number)]
        return ids, batches.padding_count / batches.token_count

    (first, second), grouped = passes(0, number=2)
    assert first != second
    assert passes(0)[0] == [first]
    assert passes(1)[0] != [first]
    _, alone = passes(0, group=False)
    assert grouped < 0.9 * alone
    # Like lengths together, but not the shortest first: batches come in an order of their own.
    lengths = {n: len(ids) for n, (ids, _, _) in real_rows_of_all().items()}
    widest = [max(lengths[n] for n in ids) for ids in first[:-1]]
    assert widest != sorted(widest)


def real_rows_of_all():
    return real_rows(PreparedBatches(ROWS, preprocessor("max_length"), 4))


def test_accumulation_groups_go_on_over_the_edge_of_a_grouped_pass():
    """Seven batches a pass in groups of three: each group's factors weigh its tokens alike."""
    prepare = preprocessor("longest")
    batches = PreparedBatches(ROWS, prepare, 4, shuffle=True, seed=0, group=True, accumulate=3)
    seen = [batch for _ in range(3) for batch in batches]
    assert len(seen) == 21
    assert prepare.row_count == 3 * len(ROWS)  # nothing is prepared twice
    for first in range(0, 21, 3):
        group = seen[first : first + 3]
        tokens = np.array([weight.sum() for _, _, weight in group])
        scale = np.array([x["loss_scale"][0, 0] for x, _, _ in group])
        np.testing.assert_allclose(scale, tokens * 3 / tokens.sum(), rtol=1e-6)


def test_what_is_padded_already_is_taken_as_it_is():
    arrays = preprocessor("max_length")(ROWS)
    batches = PreparedBatches(arrays, preprocessor("longest"), 4, shuffle=True, group=True)
    assert {x["token_ids"].shape[1] for x, _, _ in batches} == {256}
    assert {x["pivot_token_ids"].shape[1] for x, _, _ in batches} == {256}


@pytest.mark.thorough("fused")
@pytest.mark.parametrize("connection", ["fused", "selected", "flare", None])
def test_losses_are_those_of_max_length(connection):
    """In the rows' own order, where both paddings have the same batches."""
    rows, found = ROWS[:10] + ENGLISH[:2], []
    for padding in ("longest", "max_length"):
        options = {} if connection != "fused" else {"dropout": 0.0}
        chosen = FusedConnection(**options) if connection == "fused" else connection
        made = model(padding, chosen)
        history = made.fit(rows, batch_size=6, epochs=2, shuffle=False, verbose=0)
        scores = made.evaluate(rows, batch_size=6, verbose=0, return_dict=True)
        found.append((history.history, scores))
    (history, scores), (whole_history, whole_scores) = found
    assert history.keys() == whole_history.keys()
    for name in ("loss", "sft_loss", *(["alignment_loss", "mean_gate"] * (connection == "fused"))):
        np.testing.assert_allclose(history[name], whole_history[name], rtol=1e-4, err_msg=name)
    for name, value in scores.items():
        assert value == pytest.approx(whole_scores[name], rel=1e-4), name


def seen_widths(run, widths):
    """`run`, and each width that it is called with."""

    def spy(model, inputs, scope, *args, **kwargs):
        widths.add(inputs["token_ids"].shape[1])
        return run(model, inputs, scope, *args, **kwargs)

    return spy


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["selected", "incline"])
def test_answers_are_those_of_max_length(kind):
    """Where a pass over the prompt comes before the answer, it is as wide as the prompts are."""
    rows, seen = [ROWS[n] for n in (0, 3, 8)], []
    prompts = [row["instruction"] for row in rows]
    for padding in ("longest", "max_length"):
        made = model(padding, "selected" if kind == "selected" else None)
        made.compile(keras.optimizers.SGD(0.02), sampler="greedy")
        if kind == "incline":
            made.intervention = Incline(sigma=2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few rows: not determined in every direction
            made.fit_transform(ROWS, ridge=0.1, verbose=0)
        widths = set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "run", seen_widths(runs.run, widths))
            seen.append(made.generate(prompts, max_length=240))
        needed = max(len(ids) for ids in made.preprocessor.prompt_ids(prompts))
        expected = min(n for n in (16, 24, 32, 48, 64, 96, 128) if n >= needed)
        assert widths == ({expected} if padding == "longest" else {240})
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


@pytest.mark.large
@pytest.mark.skipif(connected.BACKEND == "torch", reason="compiles, where it is told to")
def test_shapes_that_are_compiled_are_few(capsys):
    """A fit of texts of all lengths: no more shapes than the cap, and the share is said once."""
    shapes = collections.Counter()
    made = model("longest", None)
    made.jit_compile = True  # on TensorFlow it runs eagerly all the same

    pad = made.preprocessor.pad

    def spy(rows, *widths):
        x, y, weight = pad(rows, *widths)
        shapes[(x["token_ids"].shape, x["pivot_token_ids"].shape)] += 1
        return x, y, weight

    made.preprocessor.pad = spy
    made.fit(ROWS, batch_size=4, epochs=3, seed=0, verbose=2)
    said = [line for line in capsys.readouterr().out.splitlines() if "were padding" in line]
    assert len(said) == 1
    assert int(said[0].split(", ")[1].split()[0]) >= len({s[0][1] for s in shapes})
    assert len({(t[1], s[1]) for t, s in shapes}) <= 4 + 1  # the rows that are left over
    made.fit(ROWS, batch_size=4, verbose=0)
    assert "were padding" not in capsys.readouterr().out


@pytest.mark.skipif(connected.BACKEND == "jax", reason="compiles each shape")
def test_what_is_not_compiled_is_as_wide_as_it_needs():
    made, seen = model("longest", None), []
    pad = made.preprocessor.pad

    def spy(rows, *widths):
        x, y, weight = pad(rows, *widths)
        seen.append((x["padding_mask"], x["pivot_padding_mask"]))
        return x, y, weight

    made.preprocessor.pad = spy
    made.fit(ROWS, batch_size=4, seed=0, verbose=0)
    made.evaluate(ROWS, batch_size=4, verbose=0)
    for mask in (mask for masks in seen for mask in masks):
        longest = int(mask.sum(axis=1).max())
        assert mask.shape[1] == min(n for n in (*range(8, 256, 8), 256) if n >= longest)
    made.preprocessor.widths = [40, 256]
    seen.clear()
    made.fit(ROWS, batch_size=4, seed=0, verbose=0)
    assert {mask.shape[1] for masks in seen for mask in masks} == {40, 256}
