"""What may import what: the package's own layering, and the frameworks that nobody needs."""

import ast
import importlib.util
import pathlib
import re

import keras
import pytest
from backend_tools import run_python, run_python_for_json

import keras_cc

PACKAGE = pathlib.Path(keras_cc.__file__).parent

# From the bottom: a module imports from the rows above its own here, and within its own row as long
# as no cycle comes of it. `name.*` is a folder with all that is in it, its face included.
LEVELS = (
    ("version", "options", "whole_files", "checksums", "losses", "torch_updates"),
    ("cc_weights",),
    (
        "passes",
        "passes.pairing",
        "passes.positions",
        "passes.rematerialization",
        "backbones",
        "backbones.families",
    ),
    (
        "calibration",
        "calibration.ridge",
        "distribution",
        "training.checkpoints",
        "training.non_finite",
        "training.watching",
    ),
    ("preprocessing.templates", "preprocessing.prompt_encoder", "data.*"),
    ("layers.*", "objectives.*", "connections.*", "preprocessing.*"),
    (
        "interventions",
        "interventions.intervention",
        "interventions.incline",
        "interventions.shift",
        "interventions.xtransplant",
    ),
    (
        "backbones.taps",
        "backbones.surgery",
        "backbones.adapting",
        "backbones.preset_files",
        "passes.runs",
    ),
    (
        "adapters.*",
        "calibration.compiled",
        "calibration.language_means",
        "calibration.closed_form",
        "calibration.atlas",
        "interventions.search",
        "generation",
    ),
    ("distillation.*", "callbacks.*", "training", "training.guards", "training.replicas"),
    (
        "training.own_answers",
        "training.paired_trainer",
        "training.resuming",
        "training.training_state",
        "training.untrained_weights",
    ),
    ("cc_causal_lm",),
    ("laboratory.*", "demo.*", "presets", "export.*", "recipes"),
    ("evaluation.*",),
    ("report.*",),
    ("comparison.*",),
    ("",),  # the package's own face
)
# Packages that are there for a user who asks for them, never for `import keras_cc`.
OPTIONAL = {
    "tensorflow",
    "tensorflow_text",
    "tensorflow_datasets",
    "jax",
    "torch",
    "grain",
    "babel",
    "phonenumbers",
    "gguf",
    "keras_hub",
    "lm_eval",
    "matplotlib",
    "rouge_score",
    "scipy",
    "tensorboard",
    "tensorflow_serving",
    "transformers",
    "tokenizers",
    "sentencepiece",
}

SUBCLASSES_OF_OTHERS = (
    "keras_cc.data.cldr_qa",
    "keras_cc.laboratory.word_tokenizer",
    "keras_cc.preprocessing.python_tokenizer",
    "keras_cc.demo.smollm2_tokenizer",
    "keras_cc.evaluation.harness",
    "keras_cc.export.graph_prompts",
    "keras_cc.export.graph_tokenizers",
    "keras_cc.export.serving",
)


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(tree):
    """`(imported name, whether at module level)` of every import that runs."""
    found = []

    def visit(node, at_top):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    found.append((full if full in MODULES else child.module, at_top))
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            visit(child, at_top and not inside)

    visit(tree, True)
    return found


def level(name):
    """Where a module stands: 0 at the bottom, None where it is not listed."""
    inside = name.partition(".")[2]
    for entry in (inside, f"{inside}.*", *(f"{parent}.*" for parent in parents(inside))):
        for number, row in enumerate(LEVELS):
            if entry in row:
                return number
    return None


def parents(name):
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def own_imports(name):
    return {
        imported
        for imported, _ in imports(TREES[name])
        if imported.split(".")[0] == "keras_cc" and imported != name
    }


@pytest.mark.once
class TestLayering:
    def test_the_modules_are_found(self):
        assert {"keras_cc", "keras_cc.layers.alignment", "keras_cc.data.batches"} <= set(MODULES)
        expected = {"backbones.families", "backbones.taps", "layers", "options", "torch_updates"}
        assert own_imports("keras_cc.backbones.surgery") == {f"keras_cc.{n}" for n in expected}

    def test_every_module_is_listed(self):
        assert not [name for name in MODULES if level(name) is None]

    def test_every_entry_names_a_module(self):
        names = {name.partition(".")[2] for name in MODULES}
        entries = [entry.removesuffix(".*") for row in LEVELS for entry in row]
        assert not set(entries) - names
        assert len(set(entries)) == len(entries)

    def test_imports_run_downwards(self):
        upwards = [
            f"{name} imports {imported}, which stands above it"
            for name in MODULES
            for imported in sorted(own_imports(name))
            if level(imported) > level(name)
        ]
        assert not upwards, "\n".join(upwards)

    def test_imports_have_no_cycle(self):
        edges = {name: own_imports(name) for name in MODULES}
        done, path = set(), []

        def visit(name):
            assert name not in path, " -> ".join([*path, name])
            if name in done or name not in edges:
                return
            path.append(name)
            for imported in sorted(edges[name]):
                visit(imported)
            path.pop()
            done.add(name)

        for name in edges:
            visit(name)

    @pytest.mark.parametrize(
        ("part", "allowed"),
        [
            ("layers", {"layers", "losses", "options", "passes"}),
            ("options", set()),
            ("losses", set()),
            ("data", {"data", "options", "whole_files"}),  # it knows no model
        ],
    )
    def test_the_bottom_knows_nothing_above_it(self, part, allowed):
        for name in MODULES:
            if name.split(".")[1:2] == [part]:
                parts = {imported.split(".")[1] for imported in own_imports(name)}
                assert parts <= allowed, name


@pytest.mark.once
class TestFrameworks:
    def test_optional_packages_are_imported_late(self):
        assert set(SUBCLASSES_OF_OTHERS) <= set(MODULES)
        early = [
            f"{name} imports {imported} at its top"
            for name in MODULES
            if name not in SUBCLASSES_OF_OTHERS  # of another package's class; imported late
            for imported, at_top in imports(TREES[name])
            if at_top and imported.split(".")[0] in OPTIONAL
        ]
        assert not early, "\n".join(early)

    def test_tensorflow_is_for_data_and_export_alone(self):
        users = [
            f"{name} imports {imported}"
            for name in MODULES
            if not name.startswith(("keras_cc.data", "keras_cc.export"))
            for imported, _ in imports(TREES[name])
            if imported.startswith("tensorflow")
        ]
        assert not users, "\n".join(users)

    def test_no_private_module_of_keras(self):
        private = ("keras.src", "keras_hub.src")
        found = [
            f"{name}: {text}"
            for name, tree in TREES.items()
            for text in [
                *(imported for imported, _ in imports(tree)),
                *(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)),
            ]
            if text.startswith(private)
        ]
        assert not found, "\n".join(found)

    def test_private_names_of_keras_are_in_surgery_alone(self):
        """A private attribute that no module here defines is somebody else's."""
        defined, used = {"_replace"}, {}  # a named tuple has it for everybody
        for name, tree in TREES.items():
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    defined.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    defined.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                elif isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
                    used.setdefault(node.attr, set()).add(name)
        foreign = {
            attribute: names for attribute, names in used.items() if attribute not in defined
        }
        assert {"_tracker", "_inbound_nodes", "_aggregate_additional_loss"} <= set(foreign)
        for attribute, names in foreign.items():
            assert names == {"keras_cc.backbones.surgery"}, f"{attribute} in {names}"


_MODULES_LOADED = """
import json, sys
watched = {"tensorflow", "torch", "jax", "keras_hub", "grain", "babel", "tensorflow_datasets"}
watched |= {"gguf", "tokenizers"}
import keras
before = sorted(watched & set(sys.modules))
import keras_cc, keras_cc.data.batches
import keras_cc.demo
print(json.dumps([before, sorted(watched & set(sys.modules))]))
"""

_HIDE_TENSORFLOW = """
import sys

class Hiding:
    # torch asks `find_spec("tensorflow")`, so it must be not found, as where it is not
    # installed, and not refused.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_text", "tensorflow_datasets"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
"""

_WITHOUT_TENSORFLOW = """
import numpy as np
import keras
import tiny, tiny_tokenizers
from keras_cc import CCCausalLM, CCPreprocessor

rows = [
    {"instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini",
     "instruction_en": "What is the currency of Kenya?", "lang": "tr"},
    {"instruction": "What is it?", "output": "a dog", "instruction_en": "", "lang": "en"},
] * 2
tokenizer = tiny_tokenizers.llama3_tokenizer()
stock = tiny.causal_lm("llama3", vocabulary_size=tokenizer.vocabulary_size())
model = CCCausalLM(stock, preprocessor=CCPreprocessor(tokenizer, 64))
model.compile(keras.optimizers.SGD(0.05), sampler="greedy")
transform = model.connection_layers()["block_0/transform_matrix"]
before = keras.ops.convert_to_numpy(transform.delta.value)
losses = model.fit(rows, batch_size=2, shuffle=False, verbose=0).history["loss"]

import grain
losses += model.fit(
    grain.MapDataset.source(rows), batch_size=2, shuffle=False, verbose=0
).history["loss"]
assert np.isfinite(losses).all() and losses[1] < losses[0], losses
assert np.abs(keras.ops.convert_to_numpy(transform.delta.value) - before).max() > 0

prompt = "Kenya'nın para birimi nedir?"
alone = model.generate(prompt, max_length=44, strip_prompt=True)
paired = model.generate(prompt, max_length=44, pivot_prompts="What is the currency of Kenya?")
assert isinstance(alone, str) and isinstance(paired, str)
assert paired.startswith(prompt)
merged = model.merge()
assert merged is stock
# Merged, the model says what the connected one said.
assert model.generate(prompt, max_length=44, strip_prompt=True) == alone
assert "tensorflow" not in sys.modules
print("done")
"""


class TestProcesses:
    def test_importing_keras_cc_brings_no_framework_that_keras_does_not(self):
        before, after = run_python_for_json(_MODULES_LOADED)
        assert keras.backend.backend() in before
        assert after == before

    @pytest.mark.skipif(
        keras.backend.backend() == "tensorflow", reason="TensorFlow is the backend at hand"
    )
    @pytest.mark.skipif(importlib.util.find_spec("grain") is None, reason="grain is not installed")
    @pytest.mark.thorough
    def test_trains_and_generates_where_tensorflow_is_not_installed(self):
        output = run_python(_HIDE_TENSORFLOW + _WITHOUT_TENSORFLOW)
        assert output.strip().splitlines()[-1] == "done"
