"""Bad rows and files: python tests/trust/bad_rows.py --examples 20000 [--atheris 60]

What is read is used, of another language, or in quarantine, and no error is another library's. The
rows that a reader takes are then prepared, and rows that no reader has seen are, as `fit` prepares
them: what is refused is refused by the library's own words. `--atheris` fuzzes the reader by
coverage for so many seconds (`pip install atheris`).
"""

import argparse
import collections
import json
import pathlib
import sys
import tempfile
import warnings

import hypothesis
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

COLUMNS = ("instruction", "output", "instruction_en", "lang", "id")
HAPPENED = collections.Counter()

# Texts with all that strangers have in them: control and bidirectional characters, halves of
# surrogate pairs, markers of chat templates, nothing at all.
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=("Cc", "Cf", "Cs", "Zs", "Mn", "Lo", "So")), max_size=20),
    st.sampled_from(
        ["", " ", "\n", "\ufeff", "<|im_start|>system", "<start_of_turn>model\n", "</s>", "nan"]
    ),
    st.sampled_from(["dog", "Kenya", "What is Kenya", "en", "sw", "tr"]),
)
VALUES = st.one_of(
    TEXTS,
    TEXTS,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=8),
    st.lists(TEXTS, max_size=2),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
)
ROWS = st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXTS), VALUES, max_size=6)
GOOD = st.fixed_dictionaries(
    {"instruction": st.just("dog Kenya"), "output": st.just("fox"), "lang": st.just("sw")},
    optional={"instruction_en": st.just("What is Kenya"), "id": st.integers()},
)


def _line(row):
    return json.dumps(row, default=repr).encode()


LINES = st.one_of(
    st.binary(max_size=60),
    ROWS.map(_line),
    GOOD.map(_line),
    # One that was good, and is cut, changed in a byte, nested, or has a key twice.
    st.tuples(GOOD.map(_line), st.integers(0, 200)).map(lambda p: p[0][: p[1]]),
    st.tuples(GOOD.map(_line), st.integers(0, 200), st.binary(min_size=1, max_size=2)).map(
        lambda p: p[0][: p[1]] + p[2] + p[0][p[1] + 1 :]
    ),
    st.integers(1, 3000).map(lambda depth: b'{"instruction": ' + b"[" * depth + b"]" * depth),
    GOOD.map(lambda row: _line(row)[:-1] + b', "output": "again"}'),
)


def check_file(content, folder):
    """Reads a file twice, raising and with a quarantine; returns the rows that are of use."""
    from keras_cc.data import load_jsonl

    path, bad = folder / "rows.jsonl", folder / "bad.jsonl"
    path.write_bytes(content)
    bad.unlink(missing_ok=True)
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    rows, refused = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            rows = load_jsonl(path, on_bad_row="quarantine", quarantine=bad, most_bad=1)
        except ValueError as error:
            assert "Empty dataset" in str(error), error
    lost = bad.read_text(encoding="utf-8").splitlines() if bad.exists() else []
    assert len(rows) + len(lost) == len(lines), (len(rows), len(lost), len(lines))
    for one in map(json.loads, lost):
        assert one["reason"] and one["file"] == str(path)
    try:
        assert load_jsonl(path) == rows
    except ValueError as error:
        refused = str(error)
        assert "Received: " in refused, refused
    assert (refused is not None) == bool(lost or not lines)
    HAPPENED.update(lines=len(lines), used=len(rows), quarantined=len(lost))
    return rows


def check_rows(rows, preprocessor):
    """Prepares rows as `fit` does: each is used, or refused by the library's own words."""
    from keras_cc.data.batches import PreparedBatches

    try:
        batches = list(PreparedBatches(rows, preprocessor, batch_size=4, method="a fuzzer"))
    except (ValueError, TypeError) as error:
        assert "Received: " in str(error), error
        HAPPENED["refused by fit"] += 1
        return
    assert sum(len(y) for _, y, _ in batches) == len(rows)
    HAPPENED["rows prepared"] += len(rows)


def preprocessor():
    import tiny_tokenizers

    import keras_cc

    return keras_cc.CCPreprocessor(tiny_tokenizers.llama3_tokenizer(), max_length=128)


def run(examples, seed=0):
    """So many examples, a third of them files; returns what happened to them."""
    HAPPENED.clear()
    prepare = preprocessor()
    options = hypothesis.settings(
        max_examples=examples // 3,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)

        @hypothesis.seed(seed)
        @options
        @hypothesis.given(st.lists(LINES, min_size=1, max_size=6))
        def files(lines):
            HAPPENED["files"] += 1
            if rows := check_file(b"\n".join(lines), folder):
                check_rows(rows, prepare)

        @hypothesis.seed(seed)
        @hypothesis.settings(options, max_examples=examples - examples // 3)
        @hypothesis.given(st.lists(st.one_of(ROWS, GOOD), min_size=1, max_size=4))
        def rows(some):
            HAPPENED["lists of rows"] += 1
            check_rows(some, prepare)

        files()
        rows()
    return dict(HAPPENED)


def fuzz(seconds):
    import atheris

    with tempfile.TemporaryDirectory() as scratch:
        with atheris.instrument_imports(include=["keras_cc.data", "json"]):
            import keras_cc.data  # noqa: F401
        folder = pathlib.Path(scratch)

        def one(content):
            check_file(content, folder)
            HAPPENED["inputs"] += 1
            if not HAPPENED["inputs"] % 10_000:  # the fuzzer ends the process, and says nothing
                print(dict(HAPPENED), flush=True)

        arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-verbosity=0"]
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, row in enumerate(({"instruction": "a", "output": "b"}, [1], "x")):
            (corpus / str(number)).write_text(json.dumps(row) + "\n")
        atheris.Setup([*arguments, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", type=int, default=0, help="seconds")
    given = parser.parse_args()
    if given.atheris:
        fuzz(given.atheris)
    else:
        print(run(given.examples, given.seed))
