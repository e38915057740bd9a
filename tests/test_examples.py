"""The examples and the notebook run, on a tiny model."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys

import keras
import keras_hub
import pytest
import tiny
import tiny_tokenizers

import keras_cc
import keras_cc.comparison
import keras_cc.demo

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def tiny_load(name="", **kwargs):
    """Stands in for `keras_cc.demo.load`: the same return, a model of a few thousand weights."""
    tokenizer = tiny_tokenizers.llama3_tokenizer()
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer)
    options = {"vocabulary_size": tokenizer.vocabulary_size(), "tie_word_embeddings": True}
    return tiny.causal_lm("llama3", preprocessor, **options), tokenizer


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    pytest.importorskip("babel", reason="the CLDR set needs babel")
    monkeypatch.setattr(keras_cc.demo, "load", tiny_load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_train_gemma(tiny_demo, tmp_path, capsys):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    import train_gemma

    before, after = train_gemma.main(
        train_gemma.Arguments(
            languages=("tr", "en"),
            steps=12,
            batch_size=4,
            learning_rate=3e-2,
            max_length=160,
            held_out=3,
            output=tmp_path / "merged",
        )
    )
    printed = capsys.readouterr().out
    assert "the same answers" in printed
    assert "Llama3CausalLM" in printed
    assert set(before) == set(after) == {"tr", "en"}
    assert all(after[lang]["sft_loss"] < before[lang]["sft_loss"] for lang in after)
    assert (tmp_path / "merged" / "model.weights.h5").exists()


@pytest.mark.once
def test_quick_changes_what_no_flag_says(monkeypatch):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_gemma

    def parse(line):
        return train_gemma.parse(train_gemma.Arguments, line.split())

    default, quick = train_gemma.Arguments(), parse("--quick")
    assert parse("") == default
    assert quick.quick and quick.steps < default.steps and quick.languages == ("tr", "en")
    said = parse("--quick --steps 80 --languages sw")
    assert (said.steps, said.languages, said.held_out) == (80, ("sw",), quick.held_out)


@pytest.mark.thorough
def test_train_gemma_on_a_file_and_with_lora(tiny_demo, tmp_path):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    import train_gemma

    lines = [
        f'{{"id": {i}, "lang": "{lang}", "instruction": "{i}?", "instruction_en": "{i}??",'
        f' "output": "{i}!"}}'
        for i in range(10)
        for lang in ("sw", "tr")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    arguments = train_gemma.Arguments(
        data=str(data), languages=("sw", "tr"), steps=2, batch_size=4, lora_rank=2, max_length=32
    )
    train, dev, held_out = train_gemma.load_rows(arguments)
    assert {row["id"] for row in held_out} == {9}
    assert {row["id"] for row in dev} == {8}
    assert len(train) == 16
    train_gemma.main(arguments)


@pytest.mark.large
@pytest.mark.filterwarnings("ignore:.*(rows are left out|is probably cut|were truncated)")
@pytest.mark.filterwarnings("ignore:.*are not determined in every direction")
@pytest.mark.parametrize(
    "recipe",
    ["cc_published", "incline", "translation_sft", "distilled_sft", "contrastive"],
)
def test_train_gemma_recipes(recipe, tiny_demo, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    all_rows = keras_cc.data.cldr_rows
    monkeypatch.setattr(
        keras_cc.data, "cldr_rows", lambda *args, **kwargs: all_rows(*args, **kwargs)[::9]
    )
    run_recipe(recipe, tmp_path)
    printed = capsys.readouterr().out
    assert "the same answers" in printed
    saved = {path.name for path in tmp_path.iterdir()}
    assert ("cc.safetensors" in saved) == (recipe in ("cc_published", "incline"))
    assert ("english_answers.jsonl" in saved) == (recipe == "distilled_sft")


@pytest.mark.thorough
def test_train_gemma_chooses_layers_on_the_untuned_model(tiny_demo, tmp_path, capsys):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    before, after = run_recipe("xtransplant", tmp_path, steps=0)
    printed = capsys.readouterr().out
    assert re.search(r"chosen: \{'source_layer': \d, 'target_layer': \d\}", printed)
    assert "the same answers" in printed
    # English rows have no pivot, so nothing is transplanted into them.
    assert after["en"]["sft_loss"] == pytest.approx(before["en"]["sft_loss"], rel=1e-5)
    assert after["tr"]["sft_loss"] != pytest.approx(before["tr"]["sft_loss"], rel=1e-5)


def run_recipe(recipe, folder, steps=2):
    import train_gemma

    arguments = train_gemma.Arguments(
        recipe=recipe,
        languages=("tr", "en"),
        steps=steps,
        batch_size=4,
        max_length=160,
        held_out=3,
        output=folder,
    )
    return train_gemma.main(arguments)


@pytest.mark.once
def test_train_llama_defaults(tiny_demo):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    import train_llama

    assert train_llama.Arguments().preset == "demo:smollm2_135m"
    assert train_llama.Arguments().template == "chatml"


@pytest.mark.once
def test_flags_are_parsed():
    tyro = pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_gemma
    finally:
        sys.path.remove(str(EXAMPLES))
    flags = {"--preset": ["gemma3_1b"], "--languages": ["sw", "yo"], "--steps": ["3"]}
    flags |= {"--lora-rank": ["4"], "--seed": ["7"], "--recipe": ["dft"]}
    flat = [word for flag, values in flags.items() for word in (flag, *values)]
    arguments = tyro.cli(train_gemma.Arguments, args=flat)
    assert arguments.languages == ("sw", "yo")
    assert (arguments.preset, arguments.steps, arguments.lora_rank) == ("gemma3_1b", 3, 4)
    assert arguments.recipe == "dft"
    with pytest.raises(SystemExit):
        tyro.cli(train_gemma.Arguments, args=["--steps", "many"])
    with pytest.raises(ValueError, match=r"`recipe` must be one of \['sft', .*recipe='magic'"):
        train_gemma.main(train_gemma.Arguments(recipe="magic"))


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is probably cut")
def test_compare(tiny_demo, tmp_path, capsys):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    pytest.importorskip("matplotlib", reason='pictures need "keras-cc[report]"')
    pytest.importorskip("rouge_score", reason='scores need "keras-cc[evaluation]"')
    import compare

    arguments = compare.Arguments(
        methods=("sft", "cc dropout=0.9"),
        seeds=(0,),
        languages=("en", "tr"),
        train_rows=4,
        dev_rows=2,
        epochs=1,
        workers=0,
        output=tmp_path / "compare",
    )
    written = compare.main(arguments)
    printed = capsys.readouterr().out
    assert "3 cells, 3 to run" in printed and "| cc dropout=0.9 |" in printed
    assert {"results.md", "report.html", "scores.png", "gate_by_language.png"} <= set(written)
    compare.main(arguments)
    assert "3 cells, 0 to run" in capsys.readouterr().out


@pytest.mark.once
def test_compare_asks_for_each_cell_once(tiny_demo):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    import compare

    cells = compare.experiments(compare.Arguments(methods=("untuned", "sft", "sft"), seeds=(0, 1)))
    assert [(cell.recipe, cell.seed) for cell in cells] == [("untuned", 0), ("sft", 0), ("sft", 1)]


@pytest.mark.large
def test_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient to run the notebook")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient to run the notebook")
    pytest.importorskip("babel", reason="the CLDR set needs babel")
    notebook = nbformat.read(EXAMPLES / "cc_tuning.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cannot = ["install", "export"] if keras.backend.backend() == "torch" else ["install"]
        if not set(cannot) & set(tags):
            cells.append(cell)
        if "parameters" in tags:
            cells.append(nbformat.v4.new_code_cell(TINY_SIZES))
    notebook.cells = cells
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any("Llama3CausalLM" in str(output) for output in outputs)
    assert (tmp_path / "merged" / "config.json").exists()
    is_exported = (tmp_path / "served" / "my_model" / "1" / "saved_model.pb").exists()
    assert is_exported == (keras.backend.backend() != "torch")


TINY_SIZES = f"""
import sys

sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import keras_cc.demo
import test_examples

keras_cc.demo.load = test_examples.tiny_load
LANGUAGES, STEPS, BATCH_SIZE, MAX_LENGTH, HELD_OUT = ["tr", "en"], 2, 2, 160, 2
"""


RESULTS = sorted((EXAMPLES / "results").glob("*/cells/*.json"))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the study ran on JAX")
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_a_cell_of_the_study_is_of_the_options_that_it_names(file, monkeypatch):
    """Where this fails, a default has changed, and the study's tables are of the old one."""
    pytest.importorskip("babel", reason="the CLDR set needs babel")
    cell = json.loads(file.read_text(encoding="utf-8"))
    # The laboratory's model is another one on each machine.
    found = cell.get("fingerprint")
    monkeypatch.setattr(keras_cc.demo.laboratory_preset, "fingerprint", lambda: found)
    assert keras_cc.comparison.cells._experiment(cell["config"]).key == file.stem


def test_the_study_is_there():
    assert {file.parts[-3] for file in RESULTS} == {
        "gemma3_270m",
        "laboratory",
        "smollm2_135m",
        "transfer_currency",
        "transfer_currency_code",
        "transfer_town",
    }


@pytest.mark.once
def test_memory_counts_the_weights_of_real_shapes(monkeypatch):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_step
    import memory

    causal_lm = benchmark_step.make_model("tiny")
    matrices = [v for v in causal_lm.backbone.weights if len(v.shape) > 1]
    counted = sum(int(keras.ops.size(v)) for v in matrices) - 512 * 32  # its head is not tied
    shape = memory.Shape(512, 32, 2, 2, 1, 16, 64)
    assert shape.weights == counted
    known = {"gemma3_270m": 268e6, "smollm2_135m": 134.5e6, "gemma2_9b": 9.24e9, "llama3_8b": 7.5e9}
    for name, weights in known.items():  # of the models' cards; Llama 3's head is not tied
        assert memory.SHAPES[name].weights == pytest.approx(weights, rel=0.01)
    one, four = (
        memory.estimate(memory.Arguments(model="gemma2_9b", data_parallel=n, model_parallel=n))
        for n in (1, 2)
    )
    for name in ("weights", "optimizer", "logits", "activations"):
        assert four[name] == pytest.approx(one[name] / 4)
    with pytest.raises(SystemExit, match=r"--model must be one of .*Received: gpt"):
        memory.estimate(memory.Arguments(model="gpt"))
    with pytest.raises(SystemExit, match=r"a multiple of --data-parallel\. Received: 8 and 3"):
        memory.estimate(memory.Arguments(data_parallel=3))
    with pytest.raises(SystemExit, match=r"--base int8 does not train.*Received: all"):
        memory.estimate(memory.Arguments(base="int8"))
    lora, whole = memory.Arguments(trains="lora"), memory.estimate(memory.Arguments(trains="lora"))
    eighth = memory.estimate(dataclasses.replace(lora, base="int8", rematerialize=True))
    quarter = 0.75 * 4 * memory.SHAPES["gemma3_270m"].weights / memory.GIB
    assert whole["weights"] - eighth["weights"] == pytest.approx(quarter)
    assert eighth["activations"] < 0.2 * whole["activations"]
    assert eighth["optimizer"] == whole["optimizer"]


@pytest.mark.large
@pytest.mark.parametrize("what", ["stock", "cc"])
def test_the_profile_knows_the_parts(what, monkeypatch):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import profile_step

    backend = keras.backend.backend()
    small = {"batch_size": 2, "length": 32, "pivot_length": 16, "answer_length": 4}
    monkeypatch.setattr("sys.argv", ["", "--model", "tiny", "--backend", backend, "--what", what]
        + [f"--{k.replace('_', '-')}={v}" for k, v in small.items()])  # fmt: skip
    parts = profile_step.main(profile_step.Arguments(model="tiny", backend=backend, what=what))
    for part in ("attention", "feed-forward and norms"):
        assert parts[part, True] > 0 and parts[part, False] > 0
    assert parts["optimizer", False] > 0 and parts["head", True] > 0
    assert (parts["gate", True] > 0) == (parts["transform", True] > 0) == (what == "cc")


@pytest.mark.large
def test_benchmark_epoch(monkeypatch):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    pytest.importorskip("babel", reason="the CLDR set needs babel")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    import benchmark_epoch

    arguments = benchmark_epoch.Arguments(
        model="tiny", backend=keras.backend.backend(), rows=24, max_length=160, turns=1, steps=3
    )
    found = benchmark_epoch.main(arguments)
    assert found["KerasHub's fit"][0]["ours"] > 0


@pytest.mark.once
@pytest.mark.parametrize("tokenized", [False, True])
def test_simulate_input(monkeypatch, tokenized):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    pytest.importorskip("grain", reason="tokenised rows are read with grain")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import simulate_input

    arguments = simulate_input.Arguments(
        model="tiny", pairs=2048, processes=4, batch_size=64, max_length=512, tokenized=tokenized
    )
    found = simulate_input.main(arguments)
    assert [pairs for pairs, _, _ in found] == [*range(192, 2049, 192), 2048]
    assert all(pace > 0 and memory > 0 for _, pace, memory in found)
    assert len({simulate_input.word(number) for number in range(3000)}) == 3000


@pytest.mark.large
def test_benchmark(monkeypatch, tmp_path):
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import benchmark

    backend = keras.backend.backend()
    small = {"model": "tiny", "backends": (backend,), "batch_size": 2, "length": 32, "turns": 1}
    arguments = benchmark.Arguments(**small, pivot_length=16, answer_length=4, output=tmp_path)
    record = benchmark.main(dataclasses.replace(arguments, rows=("stock", "merged", "pipeline")))
    assert len(record["rows"]) == 3
    for row in record["rows"].values():
        assert row["seconds"]["lowest"] > 0 and row["gib"]["ours"] > 0
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(record))
    assert f"KerasHub's fit, {backend}" in (tmp_path / "benchmark.md").read_text()
    if backend == "jax":
        apart = benchmark.apart(dataclasses.replace(arguments, batch_size=4))
        assert apart.keys() == {2, 4} and max(apart.values()) < 1e-5
    large = benchmark.run(arguments, "large", backend)
    assert large["tokens_per_second"] > 0 and large["share"] > 0
    if shutil.which("nvidia-smi") is None:
        with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
            benchmark.main(dataclasses.replace(arguments, device="gpu"))
