"""CC-Tuning, or a method it is compared with, from start to end on real weights.

    KERAS_BACKEND=jax python examples/train_gemma.py
    KERAS_BACKEND=jax python examples/train_gemma.py --quick
    KERAS_BACKEND=jax python examples/train_gemma.py --recipe dft

Loads Gemma 3 270M, with no account anywhere, connects it, fine-tunes it on questions about the
world's territories in three languages and English, and shows what changed on territories that it
has never seen, on the path that a user gets: their own language alone. Then it merges, saves,
loads again, and shows the same answers from the stock model. What cannot be merged (the published
connection, interventions) is saved beside the model instead. A picture of the scores and of the
learning curve lies beside the model too.
"""

import dataclasses
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tyro

import keras_cc
from keras_cc.comparison.rows import spread
from keras_cc.data.widths import width_of
from keras_cc.evaluation import Scorer
from keras_cc.evaluation.metrics import first_line


@dataclasses.dataclass
class Arguments:
    """Fine-tune a KerasHub causal language model with CC-Tuning, or another recipe."""

    recipe: str = "cc"
    """What is trained: sft, cc, cc_published, dft, ...; the table is in RECIPES.md."""
    preset: str = "demo:gemma3_270m"
    """A KerasHub preset (name, handle or folder), or `demo:` and the name of a demo model."""
    data: str | None = None
    """JSONL file or folder with instruction, output, instruction_en; default: the CLDR set."""
    languages: tuple[str, ...] = ("tr", "sw", "id", "en")
    """Languages to train on and to score; rows in English bypass the connection."""
    quick: bool = False
    """Something to see at once: two languages, few steps, few rows; enough to learn little."""
    steps: int = 80
    """Training steps; 0 for the methods at inference on the untuned model."""
    batch_size: int = 8
    """Rows a step."""
    learning_rate: float = 3e-5
    """Peak learning rate: a tenth of the steps up to it, then a cosine down to 0."""
    lora_rank: int | None = None
    """Train LoRA matrices of this rank and the connection; default: all but the embedding."""
    train_embedding: bool = False
    """Train the token embedding too: most of Gemma's weights, and half of a step's time."""
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


#: What `--quick` changes, where no flag says otherwise.
QUICK = {"languages": ("tr", "en"), "steps": 10, "batch_size": 4, "held_out": 8}


def parse(of, line=None):
    """The arguments of a command line (default: of this process) for a class of them."""
    args = tyro.cli(of, args=line)
    if args.quick:
        args = tyro.cli(of, args=line, default=dataclasses.replace(of(), **QUICK))
    return args


def load_rows(args):
    """Rows to train on, to choose options by, and to score: other territories, or other items."""
    if args.data is None:
        splits = ("train", "validation", "test")
        return [keras_cc.data.cldr_rows(args.languages, split=split) for split in splits]
    rows = keras_cc.data.load_jsonl(args.data, languages=args.languages)
    # The same item in another language is the same id: split by id, not by row.
    ids = sorted({str(row.get("id", number)) for number, row in enumerate(rows)})
    tenth = max(1, len(ids) // 10)
    place = dict.fromkeys(ids[: -2 * tenth], 0)
    place |= dict.fromkeys(ids[-2 * tenth : -tenth], 1) | dict.fromkeys(ids[-tenth:], 2)
    splits = [[], [], []]
    for number, row in enumerate(rows):
        splits[place[str(row.get("id", number))]].append(row)
    return splits


def answer(model, rows, args):
    """Greedy answers, in the user's language alone where the recipe can do that."""
    prompts, pivots = [row["instruction"] for row in rows], pivots_of(model, rows)
    # Room for the longest answer that would be right: a model that never stops costs no more.
    ids = zip(
        model.preprocessor.prompt_ids(prompts),
        model.preprocessor.answer_ids([row["output"] for row in rows]),
        strict=True,
    )
    longest = width_of(max(len(prompt) + len(expected) for prompt, expected in ids) + 4)
    return model.generate(
        prompts,
        pivot_prompts=pivots,
        max_length=min(longest, args.max_length),
        strip_prompt=True,
    )


def pivots_of(model, rows):
    """The English prompts, where an intervention reads them: none for English rows."""
    if model.intervention is None or not model.intervention.needs_pivot:
        return None
    return [row["instruction_en"] if row.get("lang") != "en" else "" for row in rows]


def score(scorer, held_out):
    """Of each language: nats an answer token, and how many answers are right.

    Both from one pass over prompt and expected answer. An answer is right where each of its tokens,
    the end included, is the likeliest one: it is what greedy generation would say, to the letter.
    """
    rows = [row for rows in held_out.values() for row in rows]
    end = scorer.preprocessor.end_token_id
    requests = [
        (prompt, [*answer, end])
        for prompt, answer in zip(
            scorer.prompt_ids([row["instruction"] for row in rows]),
            scorer.answer_ids([row["output"] for row in rows]),
            strict=True,
        )
    ]
    pivots = pivots_of(scorer.model, rows)
    if pivots is not None:
        pivots = [
            ids if text else None
            for ids, text in zip(
                scorer.prompt_ids([text or "-" for text in pivots]), pivots, strict=True
            )
        ]
    found, scores = iter(scorer.log_likelihoods(requests, pivots)), {}
    for language, of_language in held_out.items():
        results = [next(found) for _ in of_language]
        tokens = sum(result.tokens for result in results)
        scores[language] = {
            "sft_loss": -sum(result.total for result in results) / tokens,
            "exact_match": sum(result.is_greedy for result in results) / len(results),
        }
    return scores


def print_scores(before, after):
    """A table of both."""
    print("\nHeld-out rows, as a user gets them (nats an answer token; right answers in %):")
    print(f"{'':>6} {'NLL':>15} {'right answers':>15}")
    for language in after:
        first, last = before[language], after[language]
        nll = f"{first['sft_loss']:.2f} -> {last['sft_loss']:.2f}"
        match = f"{100 * first['exact_match']:.0f} -> {100 * last['exact_match']:.0f}"
        print(f"{language:>6} {nll:>15} {match:>15}")


class StepLosses(keras.callbacks.Callback):
    """The loss of each step; Keras shows their mean over the epoch so far."""

    def __init__(self):
        super().__init__()
        self.losses, self._sum = [], 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._sum = 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = float(logs["loss"]) * (batch + 1)
        self.losses.append(total - self._sum)
        self._sum = total


def train(model, recipe, train_rows, dev_rows, args):
    """The recipe's data, its training steps, and what comes after them; the steps' losses."""
    rows = recipe.data(model, train_rows, **data_options(recipe, args))
    if rows is not train_rows:
        print(f"{len(rows)} rows to train on, by {recipe.name}")
    curve = StepLosses()
    if args.steps:
        print("Training. The first step of each shape is compiled: up to a minute without a word.")
        epoch = -(-len(rows) // args.batch_size)  # steps in a whole epoch
        epochs = -(-args.steps // epoch)
        model.fit(
            rows,
            batch_size=args.batch_size,
            epochs=epochs,
            steps_per_epoch=args.steps // epochs,
            seed=args.seed,
            callbacks=[curve],
        )
    found = recipe.finish(model, spread(train_rows, 512), spread(dev_rows, args.held_out))
    for name, fit in found.get("fits", {}).items():
        print(f"{name}: error {fit.error_before:.4g} -> {fit.error_after:.4g}, ridge {fit.ridge}")
    if "search" in found:
        best = found["search"]
        print(f"chosen: {best.best}, NLL {best.baseline:.3f} -> {best.losses.min():.3f}")
    return curve.losses


def data_options(recipe, args):
    """For a distillation: a file that keeps the answers, and what is kept of each."""
    if recipe.augment != "distillation":
        return {}
    args.output.mkdir(parents=True, exist_ok=True)
    cache = args.output / "english_answers.jsonl"
    return {"cache": cache, "max_length": args.max_length, "clean": first_line}


def save_and_load(model, tokenizer, args):
    """Save what was trained and load it again: a stock preset, and beside it what cannot merge."""
    if model.is_mergeable:
        kept = {"connection": None}  # the same prompts and template around the stock model
        stock = model.merge()
    else:
        kept = {"connection": model.connection, "intervention": copy_of(model.intervention)}
        args.output.mkdir(parents=True, exist_ok=True)
        model.save_cc_weights(args.output / "cc.safetensors")
        stock = model.disconnect()
    print(f"\nA stock {type(stock).__name__}, {kept} beside it; saving to {args.output}")
    keras_cc.save_preset(stock, args.output, tokenizer=tokenizer)
    loaded, _ = keras_cc.load_preset(args.output, dtype=args.dtype)
    again = keras_cc.CCCausalLM(loaded, **kept, preprocessor=model.preprocessor)
    if "intervention" in kept:
        again.load_cc_weights(args.output / "cc.safetensors")
    again.compile(sampler="greedy")
    return again


def copy_of(intervention):
    """An intervention of the same options, without its matrices."""
    return intervention and type(intervention).from_config(intervention.get_config())


def main(args):
    """Run the whole of it."""
    start = time.time()
    keras.utils.set_random_seed(args.seed)
    print(f"Loading {args.preset}")
    recipe = keras_cc.recipes.get(args.recipe)
    causal_lm, tokenizer = keras_cc.load_preset(args.preset, dtype=args.dtype)
    train_rows, dev_rows, rest = load_rows(args)
    by_language = {
        language: spread([row for row in rest if row.get("lang") == language], args.held_out)
        for language in args.languages
    }
    held_out = {language: rows for language, rows in by_language.items() if rows}
    print(
        f"{recipe.name}: {recipe.changes}\n"
        f"{len(train_rows)} training rows, {sum(map(len, held_out.values()))} held-out rows"
    )

    if args.lora_rank is not None:
        causal_lm.backbone.enable_lora(args.lora_rank)
    elif not args.train_embedding:
        causal_lm.backbone.token_embedding.trainable = False
    model = recipe.model(
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

    examples = [rows[0] for rows in held_out.values()]
    scorer = Scorer(model, batch_size=16)
    print("Scoring the untuned model (compiling first)")
    before, said = score(scorer, held_out), answer(model, examples, args)
    losses = train(model, recipe, train_rows, dev_rows, args)
    print("Scoring the tuned model")
    after, answers = score(scorer, held_out), answer(model, examples, args)
    print_scores(before, after)

    print("\nA few answers:")
    for row, first, last in zip(examples, said, answers, strict=True):
        print(
            f"  {row['instruction']}\n"
            f"    untuned {first_line(first)!r}, tuned {first_line(last)!r}, "
            f"expected {row['output']!r}"
        )

    again = save_and_load(model, tokenizer, args)
    same = answer(again, examples, args) == answers
    print(f"Loaded again: {'the same answers' if same else 'OTHER ANSWERS'}")
    picture = keras_cc.report.draw_run(
        before,
        after,
        losses,
        args.output / "run.png",
        title=f"{recipe.name}, {args.steps} steps: held-out rows, before (rings) and after",
    )
    print(f"A picture of it: {picture}")
    print(f"Done in {time.time() - start:.0f} s")
    if not same:
        raise SystemExit("The saved model does not answer as the trained one did.")
    return before, after


if __name__ == "__main__":
    main(parse(Arguments))
