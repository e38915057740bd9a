"""Tiny KerasHub tokenizers, built in memory: no download, a second to make."""

import functools
import io

import keras_hub
import sentencepiece

CORPUS = (
    "What is the currency of Kenya?",
    "Kenya'nın para birimi nedir?",
    "Kenya şilini",
    "the quick brown fox jumped over the lazy dog",
    "Answer the question with one number. (1) yes (2) no",
    "केन्या की मुद्रा क्या है? 肯尼亚的货币是什么?",
)
ROW = {
    "instruction": "Kenya'nın para birimi nedir?",
    "output": "Kenya şilini",
    "instruction_en": "What is the currency of Kenya?",
    "lang": "tr",
    "id": 17,
}


def ids_of(tokenizer, text):
    return list(tokenizer.tokenize([text])[0])


@functools.cache
def sentencepiece_proto(
    special_tokens: tuple[str, ...],
    control_tokens: tuple[str, str, str, str],
    dummy_prefix: bool,
    vocab_size: int = 400,
) -> bytes:
    """A byte-fallback BPE model. `control_tokens`: pad, bos, eos, unk; an empty one is absent."""
    pad, bos, eos, unk = control_tokens
    order = [t for t in (pad, eos, bos, unk) if t]
    ids = {t: order.index(t) if t else -1 for t in control_tokens}
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(special_tokens),
        pad_id=ids[pad],
        bos_id=ids[bos],
        eos_id=ids[eos],
        unk_id=ids[unk],
        pad_piece=pad or "<pad>",
        bos_piece=bos,
        eos_piece=eos,
        unk_piece=unk,
        minloglevel=2,
    )
    return writer.getvalue()


def gemma_tokenizer() -> keras_hub.tokenizers.GemmaTokenizer:
    """As Gemma's: no dummy prefix, turn markers matched in text (USER_DEFINED)."""
    return keras_hub.tokenizers.GemmaTokenizer(proto=_gemma_proto())


def gemma3_tokenizer() -> keras_hub.tokenizers.Gemma3Tokenizer:
    """As Gemma 3's text-only models; its preprocessor needs TensorFlow, this does not."""
    return keras_hub.tokenizers.Gemma3Tokenizer(proto=_gemma_proto(), has_vision_tokens=False)


def _gemma_proto() -> bytes:
    return sentencepiece_proto(
        ("<start_of_turn>", "<end_of_turn>", "\n", "\n\n"),
        ("<pad>", "<bos>", "<eos>", "<unk>"),
        dummy_prefix=False,
    )


def llama_tokenizer(**kwargs) -> keras_hub.tokenizers.LlamaTokenizer:
    """As Llama 2's: dummy prefix, `<s>` and `</s>` are CONTROL and not matched in text."""
    proto = sentencepiece_proto((), ("", "<s>", "</s>", "<unk>"), dummy_prefix=True)
    return keras_hub.tokenizers.LlamaTokenizer(proto=proto, **kwargs)


def mistral_tokenizer() -> keras_hub.tokenizers.MistralTokenizer:
    """As Mistral v0.3's: `[INST]` and `[/INST]` are tokens."""
    proto = sentencepiece_proto(
        ("[INST]", "[/INST]"), ("", "<s>", "</s>", "<unk>"), dummy_prefix=True
    )
    return keras_hub.tokenizers.MistralTokenizer(proto=proto)


def byte_pair_vocabulary(special_tokens: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """All 256 bytes (in the GPT-2 alphabet), a few merges, then the special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(other))]
    merges = ["t h", "th e", "Ġ the", "u s", "e r", "us er", "Ċ Ċ", "Ġ K", "e n", "en y", "a n"]
    tokens = [*alphabet, *("".join(m.split()) for m in merges), *special_tokens]
    return {t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges


LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def llama3_tokenizer() -> keras_hub.tokenizers.Llama3Tokenizer:
    """As Llama 3's: special tokens are matched in text (`unsplittable_tokens`)."""
    vocabulary, merges = byte_pair_vocabulary(LLAMA3_SPECIALS)
    return keras_hub.tokenizers.Llama3Tokenizer(vocabulary=vocabulary, merges=merges)


def smollm2_tokenizer() -> keras_hub.tokenizers.Llama3Tokenizer:
    """As SmolLM2's: `<|im_start|>` is the start token, `<|im_end|>` the end token."""
    vocabulary, merges = byte_pair_vocabulary(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return keras_hub.tokenizers.Llama3Tokenizer(
        vocabulary=vocabulary,
        merges=merges,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        misc_special_tokens=set(),
    )


def qwen_tokenizer() -> keras_hub.tokenizers.QwenTokenizer:
    """As Qwen 2.5's: no start token; `<|im_start|>` in text is *not* matched."""
    vocabulary, merges = byte_pair_vocabulary(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return keras_hub.tokenizers.QwenTokenizer(vocabulary=vocabulary, merges=merges)


def gpt2_tokenizer() -> keras_hub.tokenizers.GPT2Tokenizer:
    """As GPT-2's: one token is start and end."""
    vocabulary, merges = byte_pair_vocabulary(("<|endoftext|>",))
    return keras_hub.tokenizers.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)


def bloom_tokenizer() -> keras_hub.tokenizers.BloomTokenizer:
    """As BLOOM's: its pad token is not id 0."""
    vocabulary, merges = byte_pair_vocabulary(("<s>", "</s>", "<pad>"))
    return keras_hub.tokenizers.BloomTokenizer(vocabulary=vocabulary, merges=merges)


def qwen3_tokenizer() -> keras_hub.tokenizers.Qwen3Tokenizer:
    """As Qwen3's: no start token, `<|im_end|>` is the end token."""
    vocabulary, merges = byte_pair_vocabulary(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return keras_hub.tokenizers.Qwen3Tokenizer(vocabulary=vocabulary, merges=merges)


def smollm3_tokenizer() -> keras_hub.tokenizers.SmolLM3Tokenizer:
    """As SmolLM3's: a `bos_token`, and yet no start token."""
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>")
    vocabulary, merges = byte_pair_vocabulary(specials)
    return keras_hub.tokenizers.SmolLM3Tokenizer(vocabulary=vocabulary, merges=merges)


def phi3_tokenizer() -> keras_hub.tokenizers.Phi3Tokenizer:
    """As Phi-3's: SentencePiece, whose end token is `<|endoftext|>`."""
    proto = sentencepiece_proto(("<|endoftext|>",), ("", "<s>", "</s>", "<unk>"), dummy_prefix=True)
    return keras_hub.tokenizers.Phi3Tokenizer(proto=proto)


def falcon_tokenizer() -> keras_hub.tokenizers.FalconTokenizer:
    """As Falcon's: one token is start and end."""
    vocabulary, merges = byte_pair_vocabulary(("<|endoftext|>",))
    return keras_hub.tokenizers.FalconTokenizer(vocabulary=vocabulary, merges=merges)


def gpt_neo_x_tokenizer() -> keras_hub.tokenizers.GPTNeoXTokenizer:
    """As GPT-NeoX's: one token is start and end."""
    vocabulary, merges = byte_pair_vocabulary(("<|endoftext|>",))
    return keras_hub.tokenizers.GPTNeoXTokenizer(vocabulary=vocabulary, merges=merges)


def opt_tokenizer() -> keras_hub.tokenizers.OPTTokenizer:
    """As OPT's: `</s>` is start and end."""
    vocabulary, merges = byte_pair_vocabulary(("</s>", "<pad>"))
    return keras_hub.tokenizers.OPTTokenizer(vocabulary=vocabulary, merges=merges)


TOKENIZERS = {
    "gemma": gemma_tokenizer,
    "gemma3": gemma3_tokenizer,
    "llama": llama_tokenizer,
    "mistral": mistral_tokenizer,
    "llama3": llama3_tokenizer,
    "smollm2": smollm2_tokenizer,
    "qwen": qwen_tokenizer,
    "gpt2": gpt2_tokenizer,
    "bloom": bloom_tokenizer,
    "qwen3": qwen3_tokenizer,
    "smollm3": smollm3_tokenizer,
    "phi3": phi3_tokenizer,
    "falcon": falcon_tokenizer,
    "gpt_neo_x": gpt_neo_x_tokenizer,
    "opt": opt_tokenizer,
}
