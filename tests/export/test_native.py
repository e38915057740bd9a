"""The C program that asks a SavedModel (`native/ask.c`), on models of a line each."""

import keras
import native_tools
import pytest

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="the C runtime is TensorFlow's"
    ),
    pytest.mark.skipif(native_tools.why_not() is not None, reason=str(native_tools.why_not())),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return native_tools.build(tmp_path_factory.mktemp("program"))


def save(answer, folder, **more_inputs):
    """A SavedModel whose signature `generate` is `answer(prompts, ...)`; returns its folder."""
    import tensorflow as tf

    specs = {"prompts": tf.TensorSpec([None], tf.string, name="prompts"), **more_inputs}
    module = tf.Module()
    module.generate = tf.function(answer, input_signature=list(specs.values()))
    tf.saved_model.save(module, str(folder), signatures={"generate": module.generate})
    return folder


@pytest.fixture(scope="module")
def upper(tmp_path_factory):
    import tensorflow as tf

    def answer(prompts):
        text = tf.strings.upper(prompts, encoding="utf-8")
        return {"text": text, "error": tf.where(prompts == "", "empty", "")}

    return save(answer, tmp_path_factory.mktemp("models") / "upper")


@pytest.fixture(scope="module")
def arguments(upper):
    return arguments_of(upper)


def arguments_of(model):
    """Of a good call, by option; tests take some away or change them."""
    inputs, outputs = native_tools.tensor_names(model, "generate")
    return {
        "--model": model,
        "--input": inputs["prompts"],
        "--text": outputs["text"],
        "--error": outputs["error"],
    }


def call(program, arguments, *prompts):
    flat = [part for option in arguments.items() for part in option]
    return native_tools.run(program, *flat, "--", *prompts)


def test_tensor_names_are_the_signatures(upper):
    inputs, outputs = native_tools.tensor_names(upper, "generate")
    assert inputs == {"prompts": "generate_prompts:0"}
    assert outputs.keys() == {"text", "error"}
    assert len(set(outputs.values())) == 2
    with pytest.raises(KeyError, match="serve"):
        native_tools.tensor_names(upper, "serve")


def test_texts_and_errors_in_the_order_of_the_prompts(program, upper):
    asked = {
        "kenya": ("KENYA", ""),
        "şu ığdır": ("ŞU IĞDIR", ""),
        "": ("", "empty"),
        "ما هي عملة كينيا؟": ("ما هي عملة كينيا؟", ""),
        "👩🏽‍🚀 go": ("👩🏽‍🚀 GO", ""),
        "two\nlines": ("TWO\nLINES", ""),
        "--text": ("--TEXT", ""),
        "--": ("--", ""),
    }
    assert native_tools.ask(program, upper, list(asked)) == list(asked.values())


def test_one_empty_prompt(program, upper):
    assert native_tools.ask(program, upper, [""]) == [("", "empty")]


def test_written_are_strings_that_end_with_nul(program, arguments):
    done = call(program, arguments, "ab", "")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"AB\0\0\0empty\0"


def test_ten_thousand_characters(program, upper):
    assert native_tools.ask(program, upper, ["ğ" * 10_000]) == [("Ğ" * 10_000, "")]


def test_a_batch_of_32(program, upper):
    # Of lengths on both sides of what TensorFlow keeps inside a string's 24 bytes.
    prompts = ["x" * length for length in range(8, 40)]
    answers = native_tools.ask(program, upper, prompts)
    assert answers == [("X" * length, "") for length in range(8, 40)]


def test_a_text_that_is_the_prompts_memory(program, tmp_path):
    model = save(lambda prompts: {"text": prompts, "error": prompts}, tmp_path / "same")
    long = "a prompt of more than 24 bytes"
    assert native_tools.ask(program, model, [long, "short"]) == [(long, long), ("short", "short")]


def test_max_length(program, tmp_path):
    import tensorflow as tf

    def answer(prompts, max_length):
        lengths = tf.fill(tf.shape(prompts), max_length)
        text = tf.strings.substr(prompts, tf.zeros_like(lengths), lengths, unit="UTF8_CHAR")
        return {"text": text, "error": tf.zeros_like(prompts)}

    spec = tf.TensorSpec([], tf.int32, name="max_length")
    model = save(answer, tmp_path / "first", max_length=spec)
    answers = native_tools.ask(program, model, ["şilin", "ab"], max_length=3)
    assert answers == [("şil", ""), ("ab", "")]
    # An input that nobody feeds is TensorFlow's to refuse.
    with pytest.raises(RuntimeError, match="generate_max_length"):
        native_tools.ask(program, model, ["şilin"])


def test_an_op_library(program, tmp_path):
    text = pytest.importorskip("tensorflow_text")
    import tensorflow as tf

    def answer(prompts):
        words = text.regex_split(prompts, " ").to_tensor("")
        return {"text": words[:, 0], "error": tf.zeros_like(prompts)}

    model = save(answer, tmp_path / "words")
    assert native_tools.ask(program, model, ["bir iki", "üç"]) == [("bir", ""), ("üç", "")]
    done = call(program, arguments_of(model), "bir iki")  # Without the library.
    assert (done.returncode, done.stdout) == (1, b"")
    assert "RegexSplitWithOffsets" in done.stderr


def test_an_op_library_that_is_not_there(program, arguments, tmp_path):
    done = call(program, {**arguments, "--library": tmp_path / "absent_ops.so"}, "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert "absent_ops.so" in done.stderr


def test_a_model_that_raises(program, tmp_path):
    import tensorflow as tf

    def answer(prompts):
        tf.debugging.assert_less(tf.strings.length(prompts), 5, message="this prompt is too long")
        return {"text": tf.identity(prompts), "error": tf.zeros_like(prompts)}

    model = save(answer, tmp_path / "raises")
    assert native_tools.ask(program, model, ["abcd"]) == [("abcd", "")]
    with pytest.raises(RuntimeError, match=r"running the model: .*this prompt is too long"):
        native_tools.ask(program, model, ["abcd", "abcde"])
    done = call(program, arguments_of(model), "abcde")
    assert (done.returncode, done.stdout) == (1, b"")


def test_not_one_string_for_each_prompt(program, tmp_path):
    import tensorflow as tf

    model = save(
        lambda prompts: {"text": prompts[:1], "error": tf.strings.length(prompts)},
        tmp_path / "shapes",
    )
    _, outputs = native_tools.tensor_names(model, "generate")
    with pytest.raises(RuntimeError, match=f"not one string for each.*{outputs['text']}"):
        native_tools.ask(program, model, ["a", "b"])
    with pytest.raises(RuntimeError, match=f"not one string for each.*{outputs['error']}"):
        native_tools.ask(program, model, ["a"])


def test_a_folder_without_a_model(program, arguments, tmp_path):
    done = call(program, {**arguments, "--model": tmp_path}, "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert "loading the model: " in done.stderr
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize("option", ["--input", "--text", "--error"])
@pytest.mark.parametrize("name", ["another:0", "generate_prompts:1"])
def test_a_tensor_that_the_model_lacks(program, arguments, option, name):
    done = call(program, {**arguments, option: name}, "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"the model has no tensor of this name: {name}" in done.stderr


@pytest.mark.parametrize("option", ["--input", "--text", "--error"])
def test_a_name_without_its_outputs_number(program, arguments, option):
    done = call(program, {**arguments, option: "prompts"}, "a")
    refused(done, "not a tensor's name: prompts\n")


@pytest.mark.parametrize("name", ["", ":0", "prompts:", "prompts:x", "prompts:-1"])
def test_what_is_no_tensors_name(program, arguments, name):
    refused(call(program, {**arguments, "--input": name}, "a"), f"not a tensor's name: {name}\n")


@pytest.mark.parametrize("option", ["--model", "--input", "--text", "--error"])
def test_a_missing_option(program, arguments, option):
    rest = {name: value for name, value in arguments.items() if name != option}
    refused(call(program, rest, "a"), f"missing: {option}\n")


def test_no_prompt(program, arguments):
    refused(call(program, arguments), "missing: -- PROMPT")


def test_an_unknown_option(program, arguments):
    refused(call(program, {**arguments, "--temperature": 1}, "a"), "unknown option: --temperature")
    refused(native_tools.run(program, "a prompt"), "unknown option: a prompt")


@pytest.mark.parametrize("value", ["", "x", "3x", "2147483648"])
def test_a_max_length_that_is_no_int32(program, value):
    refused(
        native_tools.run(program, "--max-length", "generate_max_length:0", value, "--", "a"),
        f"not an int32: {value}\n",
    )


@pytest.mark.parametrize("last", [["--model"], ["--library"], ["--max-length", "name:0"]])
def test_an_option_without_its_value(program, last):
    refused(native_tools.run(program, *last), f"no value for: {last[0]}\n")


def refused(done, why):
    assert (done.returncode, done.stdout) == (2, b"")
    assert why in done.stderr
    assert "usage: ask" in done.stderr
