"""Rows that were tokenised once train as the rows they were made of, and nothing else does."""

import json
import shutil

import connected
import keras
import numpy as np
import pytest
import tiny
import tiny_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from keras_cc import CCCausalLM, CCPreprocessor, FusedConnection, SelfDistillation
from keras_cc.data import TokenizedRows, tokenize, tokenized
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.prepared import PackedRow

pytest.importorskip("grain")

TOKENIZER = tiny_tokenizers.llama3_tokenizer()


def row(number, answer="dog", lang="sw"):
    made = {
        "instruction": f"{number}? " + "Kenya " * (number * 7 % 11),
        "output": None if answer is None else f"{answer} " * (1 + number % 3),
        "instruction_en": "What " * (1 + number % 4),
        "lang": lang,
        "id": f"r{number}",
    }
    return made


ROWS = [row(number, lang="en" if number % 5 == 4 else "sw") for number in range(23)]
PAIRS = [row(number, answer=None if number % 3 == 0 else "dog") for number in range(14)]


def preprocessor(max_length=64, **options):
    return CCPreprocessor(TOKENIZER, max_length, **options)


def written(folder, rows=ROWS, made=None, **options):
    return tokenize(rows, made or preprocessor(), folder, verbose=0, **options)


# ---------------------------------------------------------------- the same rows


@pytest.mark.once
def test_rows_come_back_in_their_places(tmp_path):
    cut = preprocessor(24, pivot_max_length=32)
    with pytest.warns(UserWarning, match="were truncated"):
        made = written(tmp_path / "a", ROWS, cut, shard_rows=5)
    packed = cut.pack(ROWS)
    assert len(made) == 23
    assert list(made.take(range(23))) == packed
    assert list(made.take([22, 0, 5, 5])) == [packed[i] for i in (22, 0, 5, 5)]
    assert [made.id(i) for i in (0, 22)] == ["r0", "r22"]
    assert made.truncated == sum(r.is_cut for r in packed) > 0
    assert made.unanswered == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {f"rows-0000{n}.array_record" for n in range(5)} | {"tokenized.json"}


@pytest.mark.once
def test_folders_are_joined_in_their_order(tmp_path):
    written(tmp_path / "a", PAIRS[:6])
    written(tmp_path / "b", PAIRS[6:], shard_rows=3)
    made = TokenizedRows(tmp_path / "a", tmp_path / "b")
    assert list(made.take(range(14))) == preprocessor().pack(PAIRS)
    assert [made.id(i) for i in (5, 6, 13)] == ["r5", "r6", "r13"]
    assert made.unanswered == sum(r["output"] is None for r in PAIRS) == 5
    made.check(preprocessor())


@pytest.mark.once
@pytest.mark.parametrize(
    "given_rows",
    [
        lambda: (dict(r) for r in ROWS),
        lambda: {name: [r[name] for r in ROWS] for name in ROWS[0]},
        lambda: [{k: v for k, v in r.items() if k != "id"} for r in ROWS],
        lambda: [{**r, "id": number} for number, r in enumerate(ROWS)],
    ],
    ids=["generator", "columns", "no ids", "numbers as ids"],
)
def test_rows_of_any_kind(tmp_path, given_rows):
    made = written(tmp_path / "a", given_rows())
    assert list(made.take(range(23))) == preprocessor().pack(ROWS)
    first = next(iter(given_rows())) if not isinstance(given_rows(), dict) else ROWS[0]
    assert made.id(0) == (str(first["id"]) if "id" in first else None)


@pytest.mark.once
@given(
    ids=st.lists(st.integers(0, 2**32 - 1), min_size=1),
    pivot=st.lists(st.integers(0, 2**32 - 1)),
    is_cut=st.booleans(),
    row_id=st.none() | st.text(st.characters(codec="utf-8")),
    data=st.data(),
)
def test_a_record_is_the_row(ids, pivot, is_cut, row_id, data):
    made = PackedRow(ids, data.draw(st.integers(0, len(ids))), is_cut, pivot)
    assert tokenized._decoded(tokenized.encoded(made, row_id)) == (made, row_id)


@pytest.mark.once
@pytest.mark.parametrize("options", [{}, {"group": True}, {"accumulate": 3, "group": True}])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_batches_are_those_of_the_rows(tmp_path, options, padding):
    made = preprocessor(padding=padding)
    kept = written(tmp_path / "a", made=preprocessor())

    def batches(source):
        found = PreparedBatches(source, made, 4, shuffle=True, seed=3, **options)
        return [batch for _ in range(2) for batch in found], found

    (own, rows), (other, tokens) = batches(ROWS), batches(kept)
    assert len(own) == len(other) == 12
    for (x, y, w), (x2, y2, w2) in zip(own, other, strict=True):
        assert x.keys() == x2.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], x2[name], err_msg=name)
        np.testing.assert_array_equal(y, y2)
        np.testing.assert_array_equal(w, w2)
    assert rows.describe([0, 17]) == tokens.describe([0, 17]) == ["r0", "r17"]


@pytest.mark.once
def test_a_pass_goes_on_where_it_was_ended(tmp_path):
    kept = written(tmp_path / "a")
    found = []
    for source in (ROWS, kept):
        begun = PreparedBatches(source, preprocessor(), 4, shuffle=True, seed=3, group=True)
        list(begun)
        begun.step += 2  # two batches of the second pass
        made = PreparedBatches(source, preprocessor(), 4, shuffle=True, seed=3, group=True)
        made.go_on(begun.position())
        found.append([batch[0] for batch in made])
    assert len(found[0]) == len(found[1]) == 4
    for own, other in zip(*found, strict=True):
        np.testing.assert_array_equal(own["row_ids"], other["row_ids"])
        np.testing.assert_array_equal(own["token_ids"], other["token_ids"])


def model(objective=None):
    keras.utils.set_random_seed(2)
    causal_lm = tiny.causal_lm("llama3", vocabulary_size=TOKENIZER.vocabulary_size())
    connection = FusedConnection(dropout=0.0)
    made = CCCausalLM(causal_lm, connection, objective or (), preprocessor=preprocessor())
    made.compile(keras.optimizers.SGD(0.05), **connected.QUICK)
    return made


@pytest.mark.parametrize("kind", ["answered", "pairs"])
def test_a_training_is_that_of_the_rows(tmp_path, kind):
    rows, objective = (ROWS, None) if kind == "answered" else (PAIRS, SelfDistillation())
    kept = written(tmp_path / "a", rows)
    found = []
    for source in (rows, kept):
        made = model(objective)
        made.fit(source, batch_size=4, epochs=2, seed=1, verbose=0)
        scores = made.evaluate(kept if kind == "answered" else ROWS, verbose=0, return_dict=True)
        found.append(([np.array(v) for v in made.trainable_variables], scores))
    (own, scores), (other, other_scores) = found
    for one, two in zip(own, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)
    assert scores == pytest.approx(other_scores, rel=1e-5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.once
def test_a_folder_that_is_there_stays(tmp_path):
    written(tmp_path / "a", ROWS[:3])
    before = (tmp_path / "a" / "tokenized.json").read_text()
    with pytest.raises(ValueError, match=r"`folder` must not be there yet.*TokenizedRows"):
        written(tmp_path / "a", ROWS)
    assert (tmp_path / "a" / "tokenized.json").read_text() == before


@pytest.mark.once
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([*ROWS, {**row(99), "instruction": " "}], "id r99: 'instruction' is empty"),
        (lambda: iter(()), "Empty dataset"),
        (preprocessor()(ROWS), "must be rows of text"),
    ],
)
def test_rows_that_cannot_be_used_leave_nothing(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "a", bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_tokens_are_not_tokenised(tmp_path):
    kept = written(tmp_path / "a")
    with pytest.raises(ValueError, match="must be rows of text"):
        written(tmp_path / "b", kept)
    with pytest.raises(TypeError, match=r"`preprocessor` must be a `keras_cc.CCPreprocessor`"):
        tokenize(ROWS, TOKENIZER, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.once
def test_a_process_that_dies_leaves_no_folder(tmp_path):
    def dying():
        yield from ROWS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "a", dying, shard_rows=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (preprocessor(128), "max_length 64 and not 128; pivot_max.* the model's preprocessor has"),
        (preprocessor(template="{instruction}\n"), r"template None and not '{instruction}"),
        (preprocessor(output_column="answer"), "output_column 'output' and not 'answer'"),
        (CCPreprocessor(tiny_tokenizers.gemma_tokenizer(), 64), "'Llama3Tokenizer' and not 'Gemma"),
        (None, "a model without a preprocessor"),
    ],
)
def test_another_preprocessor_is_refused(tmp_path, other, message):
    kept = written(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        PreparedBatches(kept, other, 4)


@pytest.mark.once
def test_a_tokenizer_that_splits_in_another_way_is_refused(tmp_path, monkeypatch):
    kept, other = written(tmp_path / "a"), preprocessor()
    pack = other.encoder.prompts
    monkeypatch.setattr(other.encoder, "prompts", lambda texts: [ids[1:] for ids in pack(texts)])
    with pytest.raises(ValueError, match="row 0 has other tokens here"):
        PreparedBatches(kept, other, 4)


@pytest.mark.once
def test_folders_of_two_preprocessors_are_no_one_set(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", made=preprocessor(128))
    with pytest.raises(ValueError, match=r"max_length 64 and not 128.*/b has"):
        TokenizedRows(tmp_path / "a", tmp_path / "b")


@pytest.mark.once
def test_what_is_no_such_folder(tmp_path):
    written(tmp_path / "a", shard_rows=9)
    with pytest.raises(ValueError, match=r"`folders` must be at least one"):
        TokenizedRows()
    with pytest.raises(ValueError, match=r"'.*nowhere', which has no tokenized.json"):
        TokenizedRows(tmp_path / "nowhere")
    for name, spoil in {
        "other": lambda f: (f / "tokenized.json").write_text(json.dumps({"format": "x"})),
        "short": lambda f: (f / "tokenized.json").write_text('{"format": "keras_cc tokenized 1"}'),
        "torn": lambda f: (f / "tokenized.json").write_text('{"format": "ker'),
    }.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(ValueError, match=r"has no tokenized.json of that kind"):
            TokenizedRows(tmp_path / name)
    manifest = json.loads((tmp_path / "a" / "tokenized.json").read_text())
    shutil.copytree(tmp_path / "a", tmp_path / "more")
    (tmp_path / "more" / "tokenized.json").write_text(json.dumps({**manifest, "rows": 24}))
    with pytest.raises(ValueError, match=r"more'\]: 24 rows>, in whose files 23 are"):
        TokenizedRows(tmp_path / "more")
    shard = tmp_path / "a" / "rows-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"rows-00001.*of {len(whole) - 7} bytes"):
        TokenizedRows(tmp_path / "a")
    shard.unlink()
    with pytest.raises(ValueError, match=r"rows-00001.*of None bytes"):
        TokenizedRows(tmp_path / "a")


@pytest.mark.once
def test_a_damaged_byte_is_found_or_is_of_no_row(tmp_path):
    kept = list(written(tmp_path / "a", [row(n % 40) for n in range(300)]).take(range(300)))
    shard = tmp_path / "a" / "rows-00000.array_record"
    whole, random, found = shard.read_bytes(), np.random.default_rng(0), 0
    for place in random.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        shard.write_bytes(damaged)
        try:
            assert list(TokenizedRows(tmp_path / "a").take(range(300))) == kept
        except RuntimeError as error:
            assert "Corrupted" in str(error)
            found += 1
    assert found


@pytest.mark.once
def test_prompts_that_are_cut_are_counted(tmp_path):
    cut = preprocessor(24, pivot_max_length=32)
    count = sum(r.is_cut for r in cut.pack(ROWS))
    with pytest.warns(UserWarning, match=f"^{count} of the 23 prompts were truncated"):
        tokenize(ROWS, cut, tmp_path / "a", verbose=0)
