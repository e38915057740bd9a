"""`KerasLM` in the lm-evaluation-harness, its own tasks on local rows among them."""

import dataclasses
import json
import pathlib
import warnings

import connected
import numpy as np
import pytest
import yaml
from backend_tools import run_python

import keras_cc

pytest.importorskip("lm_eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the harness' own and its packages', while they are imported
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.instance import Instance

    from keras_cc.evaluation import KerasLM, Scorer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TEXT = "Kenya'nın para birimi nedir?"


def instances(kind, *arguments):
    return [Instance(kind, {}, args, n, metadata=("t", n, 1)) for n, args in enumerate(arguments)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def model():
    model = connected.text_model("llama3", with_preprocessor=True)
    connected.train_connection(model, scale=0.3)
    return model


@pytest.fixture(scope="module")
def lm(model):
    return KerasLM(model, batch_size=2, template="llama3", verbose=0)


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, batch_size=2, verbose=0)


class Cache:
    """Stands in for the harness' hook: what was kept, by kind and request."""

    def __init__(self):
        self.kept = {}

    def add_partial(self, kind, request, result):
        self.kept[kind, json.dumps(request)] = result


class TestLogLikelihoods:
    def test_white_space_before_a_continuation_belongs_to_it(self, lm, scorer):
        requests = instances("loglikelihood", ("Kenya", " the fox"), ("Kenya ", "the fox"))
        one, other = lm.loglikelihood(requests)
        assert one == other
        start, tokenize = lm.tokenizer.start_token_id, lm.tokenizer.tokenize
        pair = [start, *map(int, tokenize("Kenya"))], list(map(int, tokenize(" the fox")))
        (expected,) = scorer.log_likelihoods([pair])
        assert one == (pytest.approx(expected.total, rel=1e-5), expected.is_greedy)

    def test_an_empty_context_is_the_start_token(self, lm, scorer):
        pair = [lm.tokenizer.start_token_id], list(map(int, lm.tokenizer.tokenize("the fox")))
        (expected,) = scorer.log_likelihoods([pair])
        requests = instances("loglikelihood", ("", "the fox"), ("  ", "the fox"))
        found = lm.loglikelihood(requests)
        assert found[0][0] == pytest.approx(expected.total, rel=1e-5)
        # White space alone goes to the continuation: the start token is all that is left.
        ids = list(map(int, lm.tokenizer.tokenize("  the fox")))
        (expected,) = scorer.log_likelihoods([(pair[0], ids)])
        assert found[1][0] == pytest.approx(expected.total, rel=1e-5)

    def test_without_a_start_token_an_empty_context_is_the_end_token(self):
        tokenizer = connected.tokenizer_of("qwen")
        stock = connected.causal_lm("qwen", tokenizer)
        lm = KerasLM(stock, tokenizer, batch_size=1, verbose=0)
        assert lm.prefix_token_id == lm.eot_token_id == tokenizer.end_token_id
        assert lm.tok_encode("fox") == list(map(int, tokenizer.tokenize("fox")))
        ids = list(map(int, tokenizer.tokenize(" fox")))
        (expected,) = lm.scorer.log_likelihoods([([tokenizer.end_token_id], ids)])
        found = lm.loglikelihood(instances("loglikelihood", ("", " fox"), (" ", "fox")))
        assert [total for total, _ in found] == [expected.total] * 2

    @pytest.mark.thorough
    def test_order_and_cache(self, lm):
        pairs = [("a", "b"), ("a longer one", " of the two"), ("a", "c")]
        cache = Cache()
        lm.set_cache_hook(cache)
        found = lm.loglikelihood(instances("loglikelihood", *pairs))
        backwards = lm.loglikelihood(instances("loglikelihood", *pairs[::-1]))
        np.testing.assert_allclose(
            [total for total, _ in found], [total for total, _ in backwards[::-1]], rtol=1e-5
        )
        assert set(cache.kept) == {("loglikelihood", json.dumps(pair)) for pair in pairs}
        assert cache.kept["loglikelihood", json.dumps(pairs[2])] == backwards[0]

    def test_what_is_too_long_is_cut_on_the_left_and_said(self, model, scorer):
        lm = KerasLM(model, batch_size=2, max_length=12, verbose=0)
        context, rest = "What is the currency of Kenya?", " the fox"
        requests = instances("loglikelihood", (context, rest), ("a", "b"))
        with pytest.warns(UserWarning, match="1 of 2 requests are longer than `max_length`, 12"):
            found = lm.loglikelihood(requests)
        # Of context and continuation, 13 ids stay: the last one is predicted and not fed.
        whole, ids = lm.tok_encode(context), list(map(int, lm.tokenizer.tokenize(rest)))
        (expected,) = scorer.log_likelihoods([(whole[-(13 - len(ids)) :], ids)])
        assert found[0][0] == pytest.approx(expected.total, rel=1e-5)
        assert lm.truncated_count == lm.get_model_info()["truncated_requests"] == 1
        with pytest.raises(ValueError, match="`max_length` must be at least 23"):
            lm.loglikelihood(instances("loglikelihood", ("a", context)))

    def test_an_option_without_a_token_of_its_own_is_refused(self, lm, scorer):
        encode, text = lm.tok_encode, "What is the currency of Kenya? the quick brown fox"
        splits = [(text[:n], text[n:]) for n in range(1, len(text)) if text[n - 1] != " "]
        joint = [encode(text)[len(encode(context)) :] for context, _ in splits]
        assert {bool(rest) for rest in joint} == {True}  # a long rest has tokens left
        pieces = [(context[-6:].lstrip(), rest[:1]) for context, rest in splits]
        lost = [p for p in pieces if len(encode(p[0] + p[1])) <= len(encode(p[0]))]
        assert lost
        for pair in lost:
            with pytest.raises(ValueError, match=r"must have a token of its own.*Received"):
                lm.loglikelihood(instances("loglikelihood", ("a", "b"), pair))
        # Where something is left, it is what the joint encoding has behind the context's tokens.
        inside = next(n for n, rest in enumerate(joint) if text[len(splits[n][0])] != " ")
        context, rest = encode(splits[inside][0]), joint[inside]
        (expected,) = scorer.log_likelihoods([(context, rest)])
        ((found, _),) = lm.loglikelihood(instances("loglikelihood", splits[inside]))
        assert found == pytest.approx(expected.total, rel=1e-5)

    @pytest.mark.parametrize("context", ["", "Kenya"])
    def test_an_empty_continuation_is_refused(self, lm, context):
        with pytest.raises(ValueError, match=r"must not be empty.*continuation=''"):
            lm.loglikelihood(instances("loglikelihood", (context, "")))

    def test_rolling_windows(self, model, scorer):
        lm = KerasLM(model, batch_size=2, max_length=10, verbose=0)
        cache = Cache()
        lm.set_cache_hook(cache)
        texts = ["What is the currency of Kenya?", "", "the fox"]
        found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *[(t,) for t in texts]))
        ids = list(map(int, lm.tokenizer.tokenize(texts[0])))
        start = [lm.tokenizer.start_token_id]
        # As documented by the harness: 10 tokens from the start token, then 10 at a time from the
        # token before them; the last window is full, and scores what was not scored yet.
        assert len(ids) == 23 and lm.prefix_token_id == start[0]
        windows = [(start, ids[:10]), (ids[9:10], ids[10:20]), (ids[12:20], ids[20:])]
        totals = [w.total for w in scorer.log_likelihoods(windows)]
        assert found[0] == pytest.approx(sum(totals), rel=1e-5)
        assert found[1] == 0.0
        fox = (start, list(map(int, lm.tokenizer.tokenize("the fox"))))
        assert found[2] == pytest.approx(scorer.log_likelihoods([fox])[0].total, rel=1e-5)
        assert set(cache.kept) == {("loglikelihood_rolling", json.dumps([t])) for t in texts}


# The published templates, rendered by hand: user, assistant, user.
TALK = [user("Hi"), assistant("Ho"), user("Ha")]
TURNS = {
    "gemma": (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
        "<start_of_turn>user\nHa<end_of_turn>\n<start_of_turn>model\n"
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHa<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nHa<|im_end|>\n<|im_start|>assistant\n"
    ),
    "smollm": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nHa<|im_end|>\n<|im_start|>assistant\n"
    ),
    "mistral": "[INST]Hi[/INST]Ho</s>[INST]Ha[/INST]",
    "Q: {instruction}\nA: ": "Q: Hi\nA: Ho<|end_of_text|>Q: Ha\nA: ",
}
WITH_SYSTEM = {
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "smollm": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "mistral": "[INST]Be brief.\n\nHi[/INST]",
}
FAMILY = {"gemma": "gemma", "chatml": "qwen", "smollm": "smollm2", "mistral": "mistral"}


def chat(template):
    """Of a tiny model of the template's family, without scoring anything."""
    family = FAMILY.get(template, "llama3")
    tokenizer = connected.tokenizer_of(family)
    stock = connected.causal_lm("llama3", tokenizer)
    return KerasLM(stock, tokenizer, template=template, verbose=0)


class TestChat:
    @pytest.mark.parametrize("template", TURNS)
    def test_turns_are_the_published_ones(self, template):
        lm = chat(template)
        assert lm.apply_chat_template(TALK) == TURNS[template]
        begun = lm.apply_chat_template([*TALK[:1], assistant("Ho")], add_generation_prompt=False)
        assert TURNS[template].startswith(begun) and begun.endswith("Ho")
        if template in WITH_SYSTEM:
            system = {"role": "system", "content": "Be brief."}
            assert lm.apply_chat_template([system, user("Hi")]) == WITH_SYSTEM[template]

    def test_a_template_of_ones_own_says_what_its_system_turn_is(self):
        talk = [{"role": "system", "content": "Be brief."}, user("Hi")]
        plain = keras_cc.templates.PromptTemplate("mine", "User: ", "\nAI: ")
        assert chat(plain).apply_chat_template(talk) == "User: Be brief.\n\nHi\nAI: "
        own = dataclasses.replace(plain, system_turn="[{system}]\n")
        assert chat(own).apply_chat_template(talk) == "[Be brief.]\nUser: Hi\nAI: "

    @pytest.mark.parametrize("template", TURNS)
    def test_one_turn_has_the_ids_of_training(self, template):
        lm = chat(template)
        text = lm.apply_chat_template([user(TEXT)])
        assert [lm.tok_encode(text)] == lm.preprocessor.prompt_ids([TEXT])

    def test_special_tokens_are_ids_and_one_start_token_is_enough(self, lm):
        tokenizer = lm.tokenizer
        end, start = tokenizer.token_to_id("<|eot_id|>"), tokenizer.start_token_id
        a, b = (list(map(int, tokenizer.tokenize(t))) for t in ("a", " b"))
        assert lm.tok_encode("a<|eot_id|> b") == [start, *a, end, *b]
        assert lm.tok_encode("<|begin_of_text|>a") == [start, *a]
        assert lm.tok_encode("a", add_special_tokens=False) == a
        assert lm.tok_encode("") == [start]

    def test_names_for_the_harness(self, model, lm):
        other = KerasLM(model, template="Q: {instruction}\nA:", verbose=0)
        names = {lm.tokenizer_name, other.tokenizer_name, KerasLM(model).tokenizer_name}
        assert len(names) == 3 and all(set(name) <= SAFE for name in names), names
        assert lm.chat_template(False) is None
        assert lm.chat_template(True) == lm.chat_template("llama3")
        assert lm.chat_template(True).count("{instruction}") == 1
        with pytest.raises(ValueError, match="`apply_chat_template` must be True or the template"):
            lm.chat_template("chatml")

    def test_no_template(self, model):
        with pytest.raises(ValueError, match="A chat template must be chosen"):
            KerasLM(model, verbose=0).apply_chat_template([user("Hi")])

    @pytest.mark.parametrize(
        "talk", [[], [assistant("Ho")], [user("Hi"), user("Ha")], [user("Hi"), assistant("Ho")]]
    )
    def test_roles_in_another_order(self, lm, talk):
        with pytest.raises(ValueError, match=r"`messages` must be one of .* Received: roles"):
            lm.apply_chat_template(talk)


SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def greedy_by_hand(model, ids, count, width=72):
    """The likeliest token after the last one, `count` times, each from a whole pass."""
    ids = list(ids)
    for _ in range(count):
        row = np.zeros((1, width), "int32")
        row[0, : len(ids)] = ids
        mask = (np.arange(width) < len(ids)).astype("int32")[None]
        logits = connected.logits(model, {"token_ids": row, "padding_mask": mask})
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids


class TestGeneration:
    CONTEXTS = ("Kenya'nın para", "the quick brown fox jumped")

    def run(self, lm, **options):
        requests = [(context, options) for context in self.CONTEXTS]
        return lm.generate_until(instances("generate_until", *requests))

    @pytest.mark.thorough
    def test_greedy_in_pieces_as_in_one(self, model, monkeypatch):
        # 6 at first, then 12, then 2 that are left: as token by token without a cache.
        monkeypatch.setattr("keras_cc.evaluation.greedy.FIRST_PIECE", 6)
        lm = KerasLM(model, batch_size=2, verbose=0)
        stops = set(lm.preprocessor.stop_token_ids)
        found = self.run(lm, until=[], max_gen_toks=9, do_sample=False, temperature=0.0)
        for context, text in zip(self.CONTEXTS, found, strict=True):
            ids = lm.tok_encode(context)
            new = greedy_by_hand(model, ids, 9)[len(ids) :]
            assert not stops & set(new)
            assert text == lm.tokenizer.detokenize([new])[0]

    def test_stop_strings_stop_tokens_and_lengths(self, lm, monkeypatch):
        (whole, _) = self.run(lm, until=[], max_gen_toks=12)
        stop = whole[3:5]
        (cut, _) = self.run(lm, until=[stop, "never there"], max_gen_toks=12)
        assert cut == whole.split(stop)[0] and len(cut) < len(whole)
        (again, _) = self.run(lm, until=stop, max_new_tokens=12)
        assert again == cut
        # A token that the model writes, as one that ends an answer.
        ids = list(map(int, lm.tokenizer.tokenize(whole)))
        stops = (*lm.preprocessor.stop_token_ids, ids[2])
        monkeypatch.setattr(keras_cc.CCPreprocessor, "stop_token_ids", stops)
        (ended, _) = self.run(lm, until=[], max_gen_toks=12)
        assert ended == lm.tokenizer.detokenize([ids[: ids.index(ids[2])]])[0]

    def test_the_models_own_sampler_stays(self, model, lm):
        model.compile("sgd", sampler="top_k", **connected.QUICK)
        before = model.causal_lm.sampler
        self.run(lm, until=[], max_gen_toks=4)
        assert model.causal_lm.sampler is before
        assert model.causal_lm.generate_function is None

    @pytest.mark.thorough
    def test_an_intervention_acts_on_the_prompt_once(self, monkeypatch):
        monkeypatch.setattr("keras_cc.evaluation.greedy.FIRST_PIECE", 2)
        model = connected.text_model("llama3", None, with_preprocessor=True)
        model.intervention = keras_cc.Incline(sigma=1.0)
        for layer in model.intervention.matrices.values():
            connected.tiny.fill(layer, 3, 0.5)
        lm = KerasLM(model, batch_size=2, verbose=0)
        found = self.run(lm, until=[], max_gen_toks=6)
        model.compile("sgd", sampler="greedy", **connected.QUICK)
        for context, text in zip(self.CONTEXTS, found, strict=True):
            length = len(lm.tok_encode(context)) + 6
            assert text == model.generate(context, length, strip_prompt=True)

    def test_order_cache_and_truncation(self, model):
        lm = KerasLM(model, batch_size=2, max_length=20, verbose=0)
        cache = Cache()
        lm.set_cache_hook(cache)
        with pytest.warns(UserWarning, match="1 of 2 requests are longer than `max_length`, 20"):
            found = self.run(lm, until=[], max_gen_toks=4)
        assert [
            cache.kept["generate_until", json.dumps([c, {"until": [], "max_gen_toks": 4}])]
            for c in self.CONTEXTS
        ] == found
        kept = lm.tok_encode(self.CONTEXTS[1])[-16:]
        new = greedy_by_hand(model, kept, 4)[16:]
        assert found[1] == lm.tokenizer.detokenize([new])[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"do_sample": True, "temperature": 1.0}, "`do_sample` must be False"),
            ({"temperature": 0.7}, "`do_sample` must be False"),
            ({"num_beams": 4}, r"`generation_kwargs` must be .*\['num_beams'\]"),
            ({"max_gen_toks": 0}, "`max_gen_toks` must be positive and less"),
            ({"max_gen_toks": 2048}, "`max_gen_toks` must be positive and less"),
        ],
    )
    def test_options_that_are_not_greedy(self, lm, options, message):
        with pytest.raises(ValueError, match=message):
            self.run(lm, until=[], **options)


# Rows of our own in the columns of the harness' tasks.
OWN_ROWS = {
    "xnli/xnli_tr": {"premise": "Kenya büyük", "hypothesis": "Kenya küçük", "label": 2},
    "xstorycloze/default_es": {
        **{f"input_sentence_{n}": f"uno {n}." for n in (1, 2, 3, 4)},
        "sentence_quiz1": "el fin",
        "sentence_quiz2": "el zorro",
        "answer_right_ending": 2,
    },
    "xcopa/default_tr": {
        "premise": "Kenya büyük.",
        "choice1": "Evet öyle",
        "choice2": "Hayır",
        "question": "cause",
        "label": 0,
    },
    "xwinograd/xwinograd_en": {
        "sentence": "The fox and the dog ran and _ was quick",
        "option1": "the fox",
        "option2": "the dog",
        "answer": "1",
    },
    "belebele/belebele_tur_Latn": {
        "flores_passage": "Kenya",
        "question": "para birimi?",
        **{f"mc_answer{n}": f"{n}" for n in (1, 2, 3, 4)},
        "correct_answer_num": "3",
    },
    "global_mmlu/default/en/global_mmlu_en_business": {
        "question": "the currency?",
        **{f"option_{letter}": f"of {letter}" for letter in "abcd"},
        "answer": "B",
        "subject_category": "Business",
    },
    "mgsm/direct/mgsm_direct_es": {
        "question": "Pregunta: 2 + 3?",
        "answer": None,
        "answer_number": 5,
    },
}
SPLITS = ("train", "validation", "test", "eval", "dev")


def write_tasks(folder):
    """The harness' own tasks, read from a file of `OWN_ROWS` and not from the data hub."""
    shipped = pathlib.Path(lm_eval.tasks.__file__).parent
    for name, row in OWN_ROWS.items():
        short = name.rsplit("/", 1)[1]
        rows = folder / f"{short}.jsonl"
        rows.write_text("".join(json.dumps({**row, "id": n}) + "\n" for n in range(2)))
        task = {
            "include": str(shipped / f"{name}.yaml"),
            "task": f"own_{short}",
            "tag": "own",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": dict.fromkeys(SPLITS, str(rows)),
                "cache_dir": str(folder / "cache"),
            },
        }
        if name.startswith("mgsm"):
            task["generation_kwargs"] = {"until": ["\n", "e"], "max_gen_toks": 8}
        (folder / f"{short}.yaml").write_text(yaml.safe_dump(task))
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(folder, lm, **options):
    manager = write_tasks(folder)
    names = [f"own_{name.rsplit('/', 1)[1]}" for name in OWN_ROWS]
    return lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options
    )


class TestTheHarnessOwnTasks:
    @pytest.mark.thorough
    def test_all_of_them(self, lm, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        found = evaluate(tmp_path, lm)
        assert set(found["results"]) == {f"own_{name.rsplit('/', 1)[1]}" for name in OWN_ROWS}
        for name, metrics in found["results"].items():
            main = "exact_match,flexible-extract" if "mgsm" in name else "acc,none"
            assert metrics[main] in (0.0, 1.0), name  # two equal rows
        # By hand: XCOPA's premise without its period, the connector, an ending in small letters.
        context, endings = "Kenya büyük çünkü", (" evet öyle", " hayır")
        requests = instances("loglikelihood", *[(context, ending) for ending in endings])
        totals = [total for total, _ in lm.loglikelihood(requests)]
        sample = found["samples"]["own_default_tr"][0]
        assert [tuple(pair) for pair in sample["arguments"]] == [(context, e) for e in endings]
        np.testing.assert_allclose([r[0][0] for r in sample["resps"]], totals, rtol=1e-5)
        assert sample["acc"] == float(np.argmax(totals) == 0)
        sample = found["samples"]["own_mgsm_direct_es"][0]
        assert "e" not in sample["resps"][0][0]
        assert found["config"]["model_class"] == "Llama3CausalLM"
        assert found["config"]["keras_backend"] == connected.BACKEND

    @pytest.mark.thorough
    def test_with_shots_in_turns(self, lm, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        manager = write_tasks(tmp_path)
        found = lm_eval.simple_evaluate(
            lm,
            tasks=["own_belebele_tur_Latn"],
            task_manager=manager,
            num_fewshot=1,
            apply_chat_template=True,
            system_instruction="Be brief.",
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
        )
        context, option = found["samples"]["own_belebele_tur_Latn"][0]["arguments"][0]
        question = "P: Kenya\nQ: para birimi?\nA: 1\nB: 2\nC: 3\nD: 4\nAnswer:"
        assert option == "A"
        assert context == lm.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                user(question),
                assistant("C"),
                user(question),
            ]
        )

    @pytest.mark.thorough
    def test_responses_are_kept(self, lm, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        manager, kept = write_tasks(tmp_path), str(tmp_path / "kept")
        options = dict(
            tasks=["own_default_tr"], task_manager=manager, bootstrap_iters=0, use_cache=kept
        )
        first = lm_eval.simple_evaluate(lm, **options)
        monkeypatch.setattr(Scorer, "as_scored", None)  # nothing is asked for again
        again = lm_eval.simple_evaluate(lm, **options)
        assert again["results"] == first["results"]


class TestByName:
    def test_a_saved_model(self, tmp_path):
        model = connected.text_model("llama3", with_preprocessor=True)
        path = str(tmp_path / "model.keras")
        model.save(path)
        lm = lm_eval.api.registry.get_model("keras").create_from_arg_string(
            f"preset={path},template=llama3,max_length=64",
            {"batch_size": "2", "device": None, "max_batch_size": None},
        )
        assert type(lm) is KerasLM and lm.scorer.batch_size == 2 and lm.max_length == 64
        assert lm.preprocessor.template.name == "llama3"
        request = instances("loglikelihood", ("Kenya", " the fox"))
        own = KerasLM(model, batch_size=2, verbose=0)
        assert lm.loglikelihood(request)[0] == pytest.approx(own.loglikelihood(request)[0])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "`model_args` must have a preset"),
            ({"preset": "a", "device": "cuda"}, "`device` must be left out"),
            ({"preset": "a", "max_batch_size": 4}, "`max_batch_size` must be left out"),
            ({"preset": "a.keras", "dtype": "bfloat16"}, "`dtype` must be left out"),
            ({"preset": "demo:gpt"}, "`name` must be one of"),
        ],
    )
    def test_what_it_cannot_do(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            KerasLM.create_from_arg_obj(arguments)


class TestBadInput:
    @pytest.mark.parametrize("name", ["max_length", "max_gen_toks", "batch_size"])
    @pytest.mark.parametrize("value", [0, 2.5, True, "auto"])
    def test_numbers(self, model, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1"):
            KerasLM(model, **{name: value})

    def test_more_than_the_models_positions(self):
        tokenizer = connected.tokenizer_of("gpt2")
        stock = connected.causal_lm("gpt2", tokenizer, max_sequence_length=20)
        assert KerasLM(stock, tokenizer).max_length == 20
        with pytest.raises(ValueError, match="`max_length` must be at most 20"):
            KerasLM(stock, tokenizer, max_length=21)

    def test_no_tokenizer(self):
        stock = connected.causal_lm("llama3", connected.tokenizer_of("llama3"))
        with pytest.raises(ValueError, match="`preprocessor` must be given"):
            KerasLM(stock)

    def test_no_model(self):
        with pytest.raises(TypeError, match=r"must be a keras_hub\.models\.CausalLM"):
            KerasLM("gemma3_270m")

    def test_an_intervention_that_reads_the_pivot(self):
        model = connected.text_model("llama3", None, with_preprocessor=True)
        model.intervention = keras_cc.XTransplant(source_layer=0, target_layer=1)
        with pytest.raises(ValueError, match="`model` must do without the pivot's prompts"):
            KerasLM(model)


_WITHOUT_TORCH = """
import sys

class Hiding:
    # Not found, as where it is not installed.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
import connected
from keras_cc.evaluation import KerasLM
import pathlib, test_harness

lm = KerasLM(connected.text_model("llama3", with_preprocessor=True), batch_size=2, verbose=0)
folder = pathlib.Path(sys.argv[1])
found = test_harness.evaluate(folder, lm)
assert len(found["results"]) == len(test_harness.OWN_ROWS)
print("done", [name for name in ("torch", "transformers", "accelerate") if sys.modules.get(name)])
"""


@pytest.mark.large
@pytest.mark.skipif(connected.BACKEND == "torch", reason="torch is the backend at hand")
def test_no_torch_is_needed(tmp_path, monkeypatch):
    here = str(pathlib.Path(__file__).parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = run_python(f"import sys; sys.path.insert(0, {here!r})\n" + _WITHOUT_TORCH, tmp_path)
    assert output.strip().splitlines()[-1] == "done []"
