"""CC-Tuning from start to end on real weights, with no account anywhere.

    KERAS_BACKEND=jax python examples/train_gemma.py

Loads Gemma 3 270M, connects it, fine-tunes it on questions about the world's territories in
three languages and English, and shows what changed on territories that it has never seen, on
the path that a user gets: their own language alone. Then it merges, saves, loads again, and
shows the same answers from the stock model.
"""

import dataclasses
import os
import pathlib
import time
import unicodedata

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import tyro
from tqdm import tqdm

import keras_cc
import keras_cc.demo


@dataclasses.dataclass
class Arguments:
    """Fine-tune a KerasHub causal language model with CC-Tuning."""

    preset: str = "demo:gemma3_270m"
    """A KerasHub preset (name, handle or folder), or `demo:` and the name of a demo model."""
    data: str | None = None
    """JSONL file or folder with instruction, output, instruction_en; default: the CLDR set."""
    languages: tuple[str, ...] = ("tr", "sw", "id", "en")
    """Languages to train on and to score; rows in English bypass the connection."""
    steps: int = 80
    """Training steps."""
    batch_size: int = 8
    """Rows a step."""
    learning_rate: float = 3e-5
    """Peak learning rate: a tenth of the steps up to it, then a cosine down to 0."""
    lora_rank: int | None = None
    """Train LoRA matrices of this rank and the connection; default: all weights."""
    max_length: int = 64
    """Tokens of a row, prompt and answer."""
    template: str | None = "{instruction}\n"
    """Prompt template: gemma, llama3, chatml, mistral, qwen, or text with {instruction}."""
    dtype: str = "float32"
    """Dtype policy of the backbone, for example mixed_bfloat16."""
    held_out: int = 32
    """Held-out rows a language that are scored."""
    output: pathlib.Path = pathlib.Path("runs/gemma")
    """Folder of the merged preset."""
    seed: int = 0
    """Seed of the rows' order, and of connection dropout."""


def load_model(args):
    """The causal language model, and what tokenizes for it."""
    name = args.preset.removeprefix("demo:")
    if name != args.preset:
        return keras_cc.demo.load(name, dtype=args.dtype)
    causal_lm = keras_hub.models.CausalLM.from_preset(args.preset, dtype=args.dtype)
    return causal_lm, causal_lm.preprocessor.tokenizer


def load_rows(args):
    """Rows to train on, and held-out ones: other territories, or the last tenth of a file."""
    if args.data is None:
        train = keras_cc.data.cldr_rows(args.languages, split="train")
        return train, keras_cc.data.cldr_rows(args.languages, split="test")
    rows = keras_cc.data.load_jsonl(args.data, languages=args.languages)
    # The same item in another language is the same id: split by id, not by row.
    ids = sorted({str(row.get("id", number)) for number, row in enumerate(rows)})
    held_out = set(ids[-max(1, len(ids) // 10) :])
    is_held_out = [str(row.get("id", number)) in held_out for number, row in enumerate(rows)]
    pairs = list(zip(rows, is_held_out, strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]


def spread(rows, count):
    """`count` of the rows, evenly spaced."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def first_line(text):
    """The first line with something in it: an untuned model goes on to the next question."""
    return (text.strip().splitlines() or [""])[0].strip()


def normal(text):
    """Text as it is compared: its first line, composed, without case."""
    return unicodedata.normalize("NFC", first_line(text)).casefold()


def answer(model, prompts, max_length):
    """Greedy answers, in the user's language alone."""
    return model.generate(prompts, max_length=max_length, strip_prompt=True)


def score(model, held_out, args, title):
    """Negative log-likelihood an answer token and exact match, per language."""
    scores = {}
    for language, rows in tqdm(held_out.items(), desc=title, unit="language"):
        results = model.evaluate(rows, batch_size=16, verbose=0, return_dict=True)
        answers = answer(model, [row["instruction"] for row in rows], args.max_length)
        hits = [
            normal(text) in {normal(accepted) for accepted in row.get("answers", [row["output"]])}
            for text, row in zip(answers, rows, strict=True)
        ]
        scores[language] = {**results, "exact_match": sum(hits) / len(hits)}
    return scores


def print_scores(before, after):
    """A table of both, and of the connected path beside them (it needs the English prompt)."""
    print("\nHeld-out rows, monolingual path (nats an answer token; exact match in %):")
    print(f"{'':>6} {'NLL':>15} {'exact match':>15} {'NLL with English prompt':>25}")
    for language in after:
        first, last = before[language], after[language]
        nll = f"{first['sft_loss']:.2f} -> {last['sft_loss']:.2f}"
        match = f"{100 * first['exact_match']:.0f} -> {100 * last['exact_match']:.0f}"
        print(f"{language:>6} {nll:>15} {match:>15} {last['connected_sft_loss']:>25.2f}")


def main(args):
    """Run the whole of it."""
    start = time.time()
    keras.utils.set_random_seed(args.seed)
    causal_lm, tokenizer = load_model(args)
    train, rest = load_rows(args)
    by_language = {
        language: spread([row for row in rest if row.get("lang") == language], args.held_out)
        for language in args.languages
    }
    held_out = {language: rows for language, rows in by_language.items() if rows}
    print(f"{len(train)} training rows, {sum(map(len, held_out.values()))} held-out rows")

    if args.lora_rank is not None:
        causal_lm.backbone.enable_lora(args.lora_rank)
    model = keras_cc.CCCausalLM(
        causal_lm,
        preprocessor=keras_cc.CCPreprocessor(
            causal_lm.preprocessor or tokenizer, args.max_length, template=args.template
        ),
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=max(1, args.steps - args.steps // 10),
        warmup_target=args.learning_rate,
        warmup_steps=args.steps // 10,
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.0), sampler="greedy")

    before = score(model, held_out, args, "before")
    epoch = -(-len(train) // args.batch_size)  # steps in a whole epoch
    epochs = -(-args.steps // epoch)
    model.fit(
        train,
        batch_size=args.batch_size,
        epochs=epochs,
        steps_per_epoch=args.steps // epochs,
        seed=args.seed,
    )
    after = score(model, held_out, args, "after")
    print_scores(before, after)

    examples = [rows[0] for rows in held_out.values()]
    prompts = [row["instruction"] for row in examples]
    answers = answer(model, prompts, args.max_length)
    print("\nA few answers:")
    for row, text in zip(examples, answers, strict=True):
        print(f"  {row['instruction']}  ->  {first_line(text)}   (expected: {row['output']})")

    merged = model.merge()
    print(f"\nMerged into a stock {type(merged).__name__}; saving to {args.output}")
    keras_cc.demo.save_preset(merged, args.output, tokenizer=tokenizer)
    loaded, tokenizer = keras_cc.demo.load_preset(args.output, dtype=args.dtype)
    # connection=None: the stock model, with the same prompts and template around it.
    stock = keras_cc.CCCausalLM(loaded, connection=None, preprocessor=model.preprocessor)
    stock.compile(sampler="greedy")
    same = answer(stock, prompts, args.max_length) == answers
    print(f"Loaded again: {'the same answers' if same else 'OTHER ANSWERS'}")
    print(f"Done in {time.time() - start:.0f} s")
    if not same:
        raise SystemExit("The merged preset does not answer as the connected model did.")
    return before, after


if __name__ == "__main__":
    main(tyro.cli(Arguments))
