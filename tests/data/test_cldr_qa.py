"""The TensorFlow Datasets side of the CLDR set, without a network."""

import builtins
import importlib.util
import socket

import pytest

pytest.importorskip("babel", reason="the CLDR set reads CLDR through Babel")
tfds = pytest.importorskip("tensorflow_datasets", reason="needs TensorFlow Datasets")

from keras_cc.data import cldr  # noqa: E402
from keras_cc.data.readers_tfds import from_tfds  # noqa: E402

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore"),  # its own dependencies warn on import
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="`tfds.load` needs TensorFlow"
)
def test_tfds_load(tmp_path):
    import keras_cc.data.cldr_qa  # noqa: F401

    dataset = tfds.load("cldr_qa/sw", split="train", data_dir=tmp_path)
    expected = cldr.cldr_rows("sw")
    assert len(dataset) == len(expected) > 400
    examples = {e["id"].decode(): e for e in tfds.as_numpy(dataset)}
    for row in expected:
        assert examples[row["id"]]["instruction"].decode() == row["instruction"]


@pytest.mark.parametrize("config", ["tr", "en", "all"])
def test_from_tfds_gives_the_rows_of_cldr_rows(config, tmp_path):
    rows = from_tfds(f"cldr_qa/{config}", split="test", data_dir=str(tmp_path))
    assert rows == cldr.cldr_rows(None if config == "all" else config, split="test")


def test_from_tfds_without_tensorflow(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "tensorflow" else find_spec(name, *args),
    )
    rows = from_tfds("cldr_qa/ja", split="validation", data_dir=str(tmp_path))
    assert rows == cldr.cldr_rows("ja", split="validation")
    assert list(tmp_path.rglob("*.array_record*")) and not list(tmp_path.rglob("*.tfrecord*"))


def test_from_tfds_names_what_is_wrong(tmp_path):
    data_dir = str(tmp_path)
    with pytest.raises(ValueError, match=r"\['target'\] are missing or not strings.*Received: "):
        from_tfds("cldr_qa/tr", output_column="target", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"\['answers'\] are missing or not strings"):
        from_tfds("cldr_qa/tr", output_column="answers", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"`split` must be among .*Received: split='dev'"):
        from_tfds("cldr_qa/tr", split="dev", data_dir=data_dir)
    assert len(from_tfds("cldr_qa/tr", split="test[:5]", data_dir=data_dir)) == 5


def test_from_tfds_without_tfds_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_tfds(name, *args, **kwargs):
        if name == "tensorflow_datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tfds)
    with pytest.raises(ImportError, match=r'pip install "keras-cc\[data\]"'):
        from_tfds("cldr_qa/tr")
