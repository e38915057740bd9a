"""Writes what Hugging Face computes from a GGUF file: token ids and logits of some texts.

    python hf_reference.py model.gguf texts.json reference.npz

An independent reader: `transformers` with its own GGUF parser and its own model code. It runs in
its own process, so that its memory is free again when the comparison starts. For text i of the
JSON list the output holds `ids_i` and, for the first `LOGITS` texts, `logits_i` (T, vocabulary).
(`load_gguf_checkpoint` is what `from_pretrained(gguf_file=...)` calls; taken directly, it needs
no `accelerate`.)
"""

import json
import os
import sys

LOGITS = 6


def main(gguf: str, texts_file: str, output: str) -> None:
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with open(texts_file, encoding="utf-8") as file:
        texts = json.load(file)
    folder, name = os.path.split(gguf)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    state = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    lost, unexpected = model.load_state_dict(state, strict=False)
    # The tied output head is the only weight without a tensor of its own.
    assert list(lost) == ["lm_head.weight"] and not unexpected, (lost, unexpected)
    model.tie_weights()
    del state
    arrays = {}
    for index, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        arrays[f"ids_{index}"] = np.array(ids, dtype=np.int32)
        if index < LOGITS:
            with torch.no_grad():
                arrays[f"logits_{index}"] = model(torch.tensor([ids])).logits[0].numpy()
    np.savez(output, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
