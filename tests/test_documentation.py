"""README, the pages under `examples/` and the docstrings: every block of Python runs as printed.

A tiny model stands in for the demo's, and what a block takes for granted (`model`, `rows`, ...) is
made for it. Where a block says what an expression gives, `get("cc").name  # "cc"`, and nothing that
was made for it is in it, that is compared. All of it runs on PyTorch, which compiles nothing;
elsewhere the quick start does, with two steps, and on TensorFlow what PyTorch cannot export.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import io
import json
import pathlib
import re
import textwrap
import tokenize

import connected
import keras
import keras_hub
import numpy as np
import pytest
import tiny_tokenizers

import keras_cc
import keras_cc.comparison.cells as cells_module
import keras_cc.demo

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
PACKAGE = ROOT / "keras_cc"
PAGES = sorted(path for path in EXAMPLES.glob("**/*.md") if path.name != "LOG.md")
BACKEND = keras.backend.backend()

# A model of a few weights never stops by itself, and few rows do not determine a matrix.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*(were truncated|is probably cut|fills max_length)"),
    pytest.mark.filterwarnings("ignore:.*(not determined in every direction|never trained)"),
    pytest.mark.filterwarnings("ignore:Too few rows to hold some out"),
]


# ---------------------------------------------------------------- blocks


@dataclasses.dataclass(frozen=True)
class Block:
    """Code as printed, and where."""

    path: pathlib.Path
    line: int
    code: str
    name: str = ""
    module: str = ""

    def run(self, namespace):
        """Run it; an error's traceback shows the file and the line that it is printed on."""
        source = "\n" * (self.line - 1) + self.code
        exec(compile(source, str(self.path), "exec"), namespace)

    @property
    def names(self):
        """The names that it takes for granted: read by a statement, made by none before it."""
        wanted, made = set(), set()
        for statement in ast.parse(self.code).body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            wanted |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - made
            made |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        return wanted

    def claims(self):
        """`(expression, value)` of each expression that a literal stands behind as a comment."""
        comments = {
            token.start[0]: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(self.code).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(self.code).body:
            if isinstance(node, ast.Expr) and node.lineno in comments:
                try:
                    value = ast.literal_eval(comments[node.lineno])
                except (SyntaxError, ValueError):
                    continue  # words
                yield ast.unparse(node), value


def fenced(text, path, first_line=1, **where):
    """The blocks of Python in a text of Markdown, whose first line is that line of the file."""
    for match in re.finditer(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        line = first_line + text.count("\n", 0, match.start(2))
        yield Block(path, line, textwrap.dedent(match[2]), **where)


def of_file(path):
    return list(fenced(path.read_text(encoding="utf-8"), path))


def of_docstrings(path):
    """The blocks in a module's docstrings, each with the full name of what it is an example of."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")

    def visit(node, name):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            return
        if ast.get_docstring(node, clean=False):
            constant = node.body[0].value
            yield from fenced(constant.value, path, constant.lineno, name=name, module=module)
            inline = re.search(r"Example: `([^`]+)`", constant.value)
            if inline:
                line = constant.lineno + constant.value.count("\n", 0, inline.start())
                yield Block(path, line, inline[1], name, module)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, f"{name}.{getattr(child, 'name', '')}")

    return list(visit(ast.parse(text), module))


DOCSTRINGS = [block for path in sorted(PACKAGE.rglob("*.py")) for block in of_docstrings(path)]


def api_reference():
    """The script that builds the API reference: it says what is public."""
    path = ROOT / ".github" / "api_reference.py"
    spec = importlib.util.spec_from_file_location("api_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def public_objects():
    """Every public module, class, function and method of ours, by the full name of its source."""
    found = {}
    reference = api_reference()
    for module in reference.public_modules():
        found[module.__name__] = module
        for name in reference.public_names(module):
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            for one in (value, *(members(value) if inspect.isclass(value) else ())):
                found[f"{one.__module__}.{one.__qualname__}"] = one
    return {name: value for name, value in found.items() if name.startswith("keras_cc")}


def members(cls):
    """Public methods and properties, inherited ones included."""
    for name, value in inspect.getmembers(cls):
        value = value.fget if isinstance(value, property) else value
        value = getattr(value, "__wrapped__", value)
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.ismethod(value)):
            yield value


# ---------------------------------------------------------------- what blocks take for granted


ROWS = [
    {"id": 1, "lang": "tr", "instruction": "Kenya'nın para birimi nedir?",
     "output": "Kenya şilini", "instruction_en": "What is the currency of Kenya?"},
    {"id": 2, "lang": "tr", "instruction": "Kenya nedir?", "output": "the dog",
     "instruction_en": "What is Kenya?"},
    {"id": 3, "lang": "en", "instruction": "What is the currency?", "output": "fox"},
    {"id": 4, "lang": "tr", "instruction": "tilki nedir?", "output": "the fox",
     "instruction_en": "What is the fox?"},
]  # fmt: skip
OPTIONS = [
    {"id": n, "lang": lang, "instruction": f"{n}?", "instruction_en": f"{n}?", "output": "2",
     "answers": ["2"]}
    for n in range(3) for lang in ("en", "tr", "sw")
]  # fmt: skip


def tiny_load(name="", num_layers=2, **kwargs):
    """Stands in for `keras_cc.demo.load`: a Gemma 3 of a few thousand weights."""
    tokenizer = tiny_tokenizers.gemma3_tokenizer()
    options = {"with_preprocessor": True, "num_layers": num_layers}
    return connected.causal_lm("gemma3", tokenizer, **options), tokenizer


RECORDED = min((EXAMPLES / "results").glob("*/cells/*.json"))  # a cell of the study


def recorded_cell():
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def transfer_cell():
    """The recorded cell as one of the protocol `transfer`: every second item was a pair."""
    cell = recorded_cell()
    kinds = ("pairs", "held_out")
    parts = {k: [kinds[n % 2] for n in range(len(v))] for k, v in cell["items"].items()}
    wrong = {k: [0.0] * len(v) for k, v in parts.items()}
    sample = {"items": cell["items"], "parts": parts}
    config = {**cell["config"], "unseen_languages": []}
    scores = {"nll": cell["scores"]["nll"], "wrong_language": wrong}
    made = {"parts": parts, "scores": scores, "sample": sample, "borrowed": {}, "config": config}
    return {**cell, **made, "name": "sft"}


def made_model():
    causal_lm, tokenizer = tiny_load()
    model = keras_cc.CCCausalLM(causal_lm, preprocessor=made_preprocessor(tokenizer))
    model.compile(keras.optimizers.SGD(0.01), sampler="greedy", **connected.QUICK)
    return model


def merged_model():
    model = made_model()
    model.merge()
    return model


def made_preprocessor(tokenizer=None):
    return keras_cc.CCPreprocessor(tokenizer or tiny_load()[1], max_length=64)


def made_batch():
    x, _, _ = made_preprocessor()(ROWS)
    return {name: x[name] for name in ("token_ids", "padding_mask")}


def made_axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


SMALL = {"languages": ("en", "tr"), "steps": 1, "train_rows": 2, "dev_rows": 1}
# From a name that blocks take for granted to what makes it, anew for each block.
MADE = {
    "answers": lambda: [row["output"] for row in ROWS],
    "axes": made_axes,
    "causal_lm": lambda: tiny_load(num_layers=7)[0],  # blocks name layers up to 6
    "cc_preprocessor": made_preprocessor,
    "cells": lambda: [recorded_cell()],
    "dev_rows": lambda: [dict(row) for row in ROWS],
    "experiments": lambda: [keras_cc.comparison.Experiment("sft", **SMALL)],
    "model": made_model,
    "prompts": lambda: [row["instruction"] for row in ROWS],
    "rows": lambda: [dict(row) for row in ROWS],
    "stock": lambda: merged_model().causal_lm,
    "tokenizer": lambda: tiny_load()[1],
    "transfer_cells": lambda: [transfer_cell()],
    "x": made_batch,
}


def namespace_for(names, own_names=()):
    """What a block runs in: `keras`, `keras_cc`, what is made for it, and its module's names."""
    made = {name: MADE[name]() for name in names if name in MADE}
    return {**dict(own_names), "__name__": "__main__", "keras": keras, "keras_cc": keras_cc, **made}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    """Tiny weights for the demo's, files of the names that blocks read, and no download."""
    pytest.importorskip("babel", reason="the CLDR set needs babel")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras_cc.demo, "load", tiny_load)
    lm_eval = pytest.importorskip("lm_eval", reason='the harness needs "keras-cc[evaluation]"')
    monkeypatch.setattr(lm_eval, "simple_evaluate", harness_result)

    def preset(cache_dir=None):
        keras_cc.save_preset(tiny_load()[0], tmp_path / "preset")
        return str(tmp_path / "preset")

    for name in ("gemma3_270m", "laboratory", "smollm2_135m"):
        monkeypatch.setattr(keras_cc.demo, name, preset)
    write_rows(tmp_path / "train.jsonl", ROWS)
    for lang in ("en", "tr", "sw"):
        of_language = [row for row in OPTIONS if row["lang"] == lang]
        write_rows(tmp_path / f"data/dev/xnli/{lang}.jsonl", of_language)
        write_rows(tmp_path / f"train/xnli/{lang}.jsonl", of_language)
    (tmp_path / "en-tr.txt").write_text("dog\tköpek\ndog\tit\nwhat\tne\n", encoding="utf-8")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "one.json").write_text(RECORDED.read_text(encoding="utf-8"))
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(cells_module, "_run_apart", cells_module._run_and_keep)
    monkeypatch.setattr(cells_module, "run", recorded_run)


def recorded_run(experiment, **kwargs):
    """Stands in for the run of one of several cells: what it finds was found before."""
    config = dataclasses.asdict(experiment)
    return {**recorded_cell(), "name": experiment.name, "seed": experiment.seed, "config": config}


def harness_result(lm, tasks):
    """Stands in for `lm_eval.simple_evaluate`, whose tasks are downloads."""
    assert lm.tok_encode("Kenya")
    return {"results": {task: {"acc,none": 0.5} for task in tasks}}


def write_gguf(path):
    gguf = pytest.importorskip("gguf", reason="weights of the demo are read with gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", np.ones(8, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- the pages


def test_readme_quick_start(tmp_path, monkeypatch):
    """Its blocks, one after the other, with no name but what they make."""
    if BACKEND != "torch":  # twenty steps take a minute there, in graphs or not
        quick = functools.partialmethod(keras_cc.CCCausalLM.compile, **connected.QUICK)
        monkeypatch.setattr(keras_cc.CCCausalLM, "compile", quick)
    namespace = {"__name__": "__main__"}
    for block in of_file(ROOT / "README.md"):
        if BACKEND != "torch":
            block = dataclasses.replace(block, code=block.code.replace("epoch=20", "epoch=2"))
        block.run(namespace)
    assert isinstance(namespace["stock"], keras_hub.models.Gemma3CausalLM)
    assert not keras_cc.backbones.surgery.is_connected(namespace["stock"])
    assert (tmp_path / "my_gemma" / "config.json").exists()


def test_readme_is_short_and_its_second_block_of_bash_is_the_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    install, tests, *_ = re.findall(r"^```bash\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)
    assert install.endswith("python examples/train_gemma.py")
    assert "-m pytest" in tests and "\n" not in tests


def exports(block):
    return "export_saved_model(" in block.code


def runs_here(*blocks):
    return BACKEND == "torch" or (BACKEND == "tensorflow" and any(map(exports, blocks)))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if of_file(page) and runs_here(*of_file(page))],
    ids=lambda page: "/".join(page.relative_to(ROOT).parts),
)
def test_page(page):
    """Its blocks, one after the other, with what the quick start leaves."""
    namespace = {**namespace_for({"rows", "tokenizer"}), "model": merged_model()}
    namespace["causal_lm"] = namespace["model"].causal_lm
    for block in of_file(page):
        run_or_refuse(block, namespace)


def run_or_refuse(block, namespace):
    """Run it; where PyTorch cannot export, it must say so."""
    if BACKEND == "torch" and exports(block):
        with pytest.raises(ValueError, match="which this backend cannot trace"):
            block.run(namespace)
    else:
        block.run(namespace)


def test_the_diffs_for_contributors_are_of_what_is_there():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    missing = []
    for diff in re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for part in diff.split("+++ b/")[1:]:
            name, _, lines = part.partition("\n")
            there = (ROOT / name).read_text(encoding="utf-8").splitlines()
            missing += [f"{name}: {line}" for line in lines.splitlines() if line[1:] not in there]
    assert not missing, "\n".join(missing)


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", CONTRIBUTING, *PAGES]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            path = (page.parent / target) if target else page
            if "://" in link:
                continue
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


# ---------------------------------------------------------------- the docstrings


def test_every_example_of_a_public_name_is_run():
    run = {block.name for block in DOCSTRINGS}
    public = public_objects()
    assert {"keras_cc.cc_causal_lm.CCCausalLM", "keras_cc.evaluation.harness.KerasLM"} <= {*public}
    documented = {
        name for name, value in public.items() if re.search(r"Examples?:", value.__doc__ or "")
    }
    assert not documented - run


@pytest.mark.parametrize("block", list(filter(runs_here, DOCSTRINGS)), ids=lambda block: block.name)
def test_docstring(block):
    # What is not public may be called by the name that its own file has for it.
    is_public = block.name in public_objects()
    own_names = {} if is_public else vars(importlib.import_module(block.module))
    namespace = namespace_for(block.names, own_names)
    run_or_refuse(block, namespace)
    if not block.names & set(MADE):
        for expression, said in block.claims():
            assert agrees(eval(expression, namespace), said), f"{expression} is not {said}"


def agrees(found, said):
    if keras.ops.is_tensor(found):
        found = keras.ops.convert_to_numpy(found)
    try:
        return np.allclose(np.asarray(found, float), np.asarray(said, float), rtol=1e-3)
    except (TypeError, ValueError):  # no numbers
        return found == said


def test_claims_are_compared():
    block = Block(ROOT, 1, 'a = 2\na + 1  # 4\n"b"  # "b"\na  # words\n(1, a)  # 1, 2\n')
    claims = dict(block.claims())
    assert claims == {"a + 1": 4, "'b'": "b", "(1, a)": (1, 2)}
    assert not agrees(3, 4) and agrees("b", "b") and not agrees("b", "c") and agrees((1, 2), (1, 2))
    assert not agrees((1, 2), (1, 3)) and agrees(keras.ops.ones((2,)), [1.0, 1.0])
