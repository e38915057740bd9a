"""Writes what the lm-evaluation-harness' own Hugging Face model answers, from a GGUF file.

    python hf_harness.py model.gguf requests.json answers.json

An independent path from requests to log-likelihoods: `HFLM` of the harness around the model of
`transformers`, read by `transformers`. `requests.json` holds `pairs`, `[context, continuation]`
each, and `ids`, the ids of every text that is asked for: the GGUF reader of `transformers` forgets
that SmolLM2's tokenizer splits numbers into digits. The answers are `[log-likelihood, is greedy]`.
"""

import json
import os
import sys


def main(gguf: str, requests_file: str, output: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    class SameIds(HFLM):
        def tok_encode(self, string, add_special_tokens=None, **_):
            return ids[string]

    with open(requests_file, encoding="utf-8") as file:
        asked = json.load(file)
    ids = asked["ids"]
    folder, name = os.path.split(gguf)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    state = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    lost, unexpected = model.load_state_dict(state, strict=False)
    # The tied output head is the only weight without a tensor of its own.
    assert list(lost) == ["lm_head.weight"] and not unexpected, (lost, unexpected)
    model.tie_weights()
    lm = SameIds(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder, gguf_file=name),
        device="cpu",
        batch_size=8,
        max_length=2048,
    )
    requests = [
        Instance("loglikelihood", {}, tuple(pair), number, metadata=("cldr", number, 1))
        for number, pair in enumerate(asked["pairs"])
    ]
    with open(output, "w", encoding="utf-8") as file:
        json.dump(lm.loglikelihood(requests, disable_tqdm=True), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
