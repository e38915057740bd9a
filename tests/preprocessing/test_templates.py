"""Templates against the published chat templates, and the ids that an encoder makes of them."""

import dataclasses

import pytest
import tiny_tokenizers
from tiny_tokenizers import TOKENIZERS

from keras_cc import CCPreprocessor
from keras_cc.preprocessing import templates
from keras_cc.preprocessing.templates import PromptTemplate

# Rendered by hand from the `chat_template` of the models named in `templates.get`, with
# `add_generation_prompt=True`, one user turn "Hi", and without the start token.
PUBLISHED = {
    "gemma": "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ),
    "smollm": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ),
    "mistral": "[INST]Hi[/INST]",
}
END_OF_TURN = {
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "smollm": "<|im_end|>",
    "mistral": None,
}
FITS = [
    ("gemma", "gemma"),
    ("gemma3", "gemma"),
    ("llama3", "llama3"),
    ("smollm2", "chatml"),
    ("smollm2", "smollm"),
    ("qwen", "chatml"),
    ("qwen", "qwen"),
    ("qwen3", "chatml"),
    ("mistral", "mistral"),
]


def tokens(tokenizer, ids):
    return [tokenizer.id_to_token(int(i)) for i in ids]


def prompt_ids(tokenizer, template, text):
    preprocessor = CCPreprocessor(tokenizer, 256, template=template, add_start_token=False)
    out = preprocessor.generate_preprocess([text])
    return out["token_ids"][0, : out["padding_mask"].sum()].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_templates_are_the_published_ones(name):
    template = templates.get(name)
    assert template.format("Hi") == PUBLISHED[name]
    assert template.end_of_turn == END_OF_TURN[name]


def test_every_built_in_template_is_tested():
    assert set(PUBLISHED) == set(templates.PROMPT_TEMPLATES)


@pytest.mark.parametrize("template", ["gemma", "llama3"])
def test_white_space_is_trimmed_where_the_published_template_trims(template):
    assert templates.get(template).format(" Hi\n") == PUBLISHED[template]


def hugging_face_ids(tokenizer, text, special):
    """What `transformers` does: cut at the added tokens, tokenise the rest piece by piece."""
    ids = []
    while text:
        at, token = min((text.find(t) % (len(text) + 1), t) for t in special)
        if text[:at]:
            ids += list(tokenizer.tokenize([text[:at]])[0])
        if at < len(text):
            ids.append(tokenizer.token_to_id(token))
        text = text[at + len(token) :]
    return ids


@pytest.mark.parametrize("tokenizer_name, template", FITS)
@pytest.mark.parametrize("text", ["Hi", "the user\n\nKenya the", "केन्या 肯尼亚", "  two  spaces "])
def test_ids_are_those_of_a_chat_template(tokenizer_name, template, text):
    tokenizer = TOKENIZERS[tokenizer_name]()
    chosen = templates.get(template)
    expected = hugging_face_ids(tokenizer, chosen.format(text), chosen.special_tokens)
    assert prompt_ids(tokenizer, template, text) == expected


def test_gemma_ids_spelled_out():
    tokenizer = tiny_tokenizers.gemma_tokenizer()
    ids = prompt_ids(tokenizer, "gemma", "Kenya")
    assert tokens(tokenizer, ids) == [
        *["<start_of_turn>", "u", "s", "er", "\n", "Kenya", "<end_of_turn>", "\n"],
        *["<start_of_turn>", "m", "o", "d", "e", "l", "\n"],
    ]


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("template", PUBLISHED)
def test_a_template_of_another_family_is_refused(tokenizer_name, template):
    tokenizer = TOKENIZERS[tokenizer_name]()
    is_chatml = templates.get(template).end_of_turn == "<|im_end|>"
    fits = (tokenizer_name, template) in FITS
    fits |= is_chatml and tokenizer_name in ("smollm2", "qwen", "qwen3")
    if fits:
        CCPreprocessor(tokenizer, 256, template=template)
    else:
        with pytest.raises(ValueError, match=r"special tokens that are not in.*Received: template"):
            CCPreprocessor(tokenizer, 256, template=template)


@pytest.mark.parametrize("tokenizer_name, template", FITS)
def test_special_tokens_in_a_users_text_stay_text(tokenizer_name, template):
    tokenizer = TOKENIZERS[tokenizer_name]()
    chosen = templates.get(template)
    mark = chosen.end_of_turn or "[/INST]"
    clean = prompt_ids(tokenizer, template, "Kenya")
    ids = prompt_ids(tokenizer, template, f"Kenya{mark} the{mark}")
    special = {tokenizer.token_to_id(t) for t in chosen.special_tokens}
    # The turns are the template's own, and the text comes back as it was typed.
    assert [i for i in ids if i in special] == [i for i in clean if i in special]
    text = tokenizer.detokenize([[i for i in ids if i not in special]])[0]
    text = text.decode() if isinstance(text, bytes) else text
    assert f"Kenya{mark} the{mark}" in text


def test_without_a_template_the_text_is_the_tokenizers():
    tokenizer = tiny_tokenizers.gemma_tokenizer()
    text = "<start_of_turn>user\nKenya<end_of_turn>"
    assert prompt_ids(tokenizer, None, text) == list(tokenizer.tokenize([text])[0])
    assert tokenizer.token_to_id("<end_of_turn>") in prompt_ids(tokenizer, None, text)


def test_custom_strings():
    template = templates.get("Q: {instruction}\nA:")
    assert template.format("why {x}?") == "Q: why {x}?\nA:"
    assert (template.special_tokens, template.end_of_turn, template.strip) == ((), None, False)
    tokenizer = tiny_tokenizers.gemma_tokenizer()
    expected = list(tokenizer.tokenize(["Q: Kenya\nA:"])[0])
    assert prompt_ids(tokenizer, "Q: {instruction}\nA:", "Kenya") == expected


def test_special_tokens_of_a_custom_string_become_ids():
    tokenizer = tiny_tokenizers.qwen_tokenizer()  # its tokenizer splits them to bytes
    ids = prompt_ids(tokenizer, "<|im_start|>{instruction}<|im_end|>", "the")
    assert tokens(tokenizer, ids) == ["<|im_start|>", "the", "<|im_end|>"]
    with pytest.raises(ValueError, match=r"<\|user\|>"):
        CCPreprocessor(tokenizer, template="<|user|>{instruction}")


@pytest.mark.parametrize("text", ["", "gema", "no placeholder", "{instruction}{instruction}", "{}"])
def test_bad_strings(text):
    with pytest.raises(ValueError, match=r"exactly once\. Received: template="):
        templates.get(text)


@pytest.mark.parametrize("value", [3, ["gemma"], b"gemma"])
def test_bad_types(value):
    with pytest.raises(TypeError, match="Received: template="):
        templates.get(value)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "gemma",
        "{instruction}\n",
        PromptTemplate("mine", "<|im_start|>", "\n", "<|im_end|>", ("<|im_start|>",), True),
        dataclasses.replace(templates.get("gemma"), suffix="!"),  # a known name, changed
        dataclasses.replace(templates.get("gemma"), system_turn="<start_of_turn>{system}"),
    ],
)
def test_serialize_round_trip(template):
    import json

    config = json.loads(json.dumps(templates.serialize(templates.get(template))))
    assert templates.get(config) == templates.get(template)


def test_a_config_from_before_there_were_system_turns():
    config = {"name": "mine", "prefix": "a", "suffix": "b"}
    assert templates.get(config) == PromptTemplate("mine", "a", "b")
    assert templates.get(config).format_system("Be brief.") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\n Be {brief} <|im_end|>\n"),
        ("qwen", "<|im_start|>system\n Be {brief} <|im_end|>\n"),
        ("llama3", "<|start_header_id|>system<|end_header_id|>\n\nBe {brief}<|eot_id|>"),
        ("gemma", None),
        ("mistral", None),
        ("Q: {instruction}", None),
    ],
)
def test_system_turns(name, expected):
    assert templates.get(name).format_system(" Be {brief} ") == expected


@pytest.mark.parametrize("name", ["qwen", "smollm"])
def test_a_templates_own_system_turn_is_of_that_form(name):
    prefix, chatml = templates.get(name).prefix, templates.get("chatml")
    own = prefix.removesuffix(chatml.prefix)
    said = own.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    assert said.startswith("You are") and chatml.format_system(said) == own


@pytest.mark.parametrize("turn", ["", "system", "{system}{system}"])
def test_bad_system_turns(turn):
    with pytest.raises(ValueError, match=r"`system_turn` .*exactly once\. Received: system_turn="):
        PromptTemplate("mine", "a", "b", system_turn=turn)


def test_templates_are_frozen_and_hashable():
    template = templates.get("gemma")
    with pytest.raises(dataclasses.FrozenInstanceError):
        template.prefix = ""
    assert hash(template) == hash(templates.get("gemma"))
