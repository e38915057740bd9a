"""`python -m keras_cc.export SOURCE PATH`: a saved model, of any backend, to a SavedModel."""

import argparse
import json
import pathlib
import sys

import keras

from keras_cc.export.model_card import ModelCard
from keras_cc.export.saved_model import SCORES, export_saved_model, run_under_tensorflow
from keras_cc.preprocessing import CCPreprocessor
from keras_cc.presets import load_preset


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m keras_cc.export", description=__doc__)
    add = parser.add_argument
    add("source", help="preset (name or folder), demo:NAME, or a .keras file of a CCCausalLM")
    add("path", help="the model's folder; the version becomes a folder in it")
    add("--version", type=int, default=1, help="the version's number (default: 1)")
    add("--overwrite", action="store_true", help="replace a version that is there")
    add("--template", help='prompt template: a name, or text with "{instruction}"')
    add("--max-length", type=int, help="tokens of prompt and answer (default: the preset's)")
    add("--max-length-argument", action="store_true", help="each request gives its own max_length")
    add("--sampler", default="greedy", help="name of a KerasHub sampler (default: greedy)")
    add("--keep-prompt", action="store_true", help="answers begin with their prompts")
    add("--score", choices=SCORES, default=SCORES[0], help="what the signature `score` gives")
    add("--warmup-prompts", nargs="*", help="prompts for TF Serving's warm-up")
    card = parser.add_argument_group("model card")
    card.add_argument("--base-model", help="name of the model that was tuned")
    card.add_argument("--method", help="what it was tuned with")
    card.add_argument("--languages", nargs="*", default=(), help="codes of its languages")
    card.add_argument("--data", help="what it was tuned on")
    card.add_argument("--report", help="results.json of a comparison")
    card.add_argument("--report-method", help="this model's method in the report")
    card.add_argument("--licence", help="licence of the base model")
    return parser.parse_args(argv)


def load(source: str, template: str | None):
    """`(model, preprocessor or None)` of a `.keras` file or a preset."""
    if source.endswith(".keras"):
        model = keras.models.load_model(source, compile=False)
        preprocessor = getattr(model, "preprocessor", None)
        if template is None or not isinstance(preprocessor, CCPreprocessor):
            return model, None
        inner = preprocessor.preprocessor
        return model, CCPreprocessor(inner, preprocessor.max_length, template=template)
    try:
        model, tokenizer = load_preset(source)
    except FileNotFoundError as error:
        raise ValueError(
            "`source` must be a preset with a tokenizer, which becomes a part of the graph: save "
            "it by `keras_cc.save_preset(model, folder, tokenizer=tokenizer)`. "
            f"Received: {source}, where {error}"
        ) from error
    if template is None:
        return model, None
    inner = model.preprocessor or tokenizer
    length = getattr(inner, "sequence_length", None) or 1024
    return model, CCPreprocessor(inner, length, template=template)


def main(argv: list[str]) -> int:
    """Run the command line; gives the exit status: 1 with a line on standard error if refused."""
    args = arguments_of(argv)
    if keras.backend.backend() != "tensorflow":
        return run_under_tensorflow(["-m", "keras_cc.export", *argv]).returncode
    try:
        folder = export(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"saved_model": str(folder)}))
    return 0


def export(args: argparse.Namespace) -> pathlib.Path:
    """Do what the command line says; gives the version's folder."""
    model, preprocessor = load(args.source, args.template)
    warmup = {} if args.warmup_prompts is None else {"warmup_prompts": args.warmup_prompts}
    return export_saved_model(
        model,
        args.path,
        version=args.version,
        overwrite=args.overwrite,
        preprocessor=preprocessor,
        max_length=args.max_length,
        max_length_argument=args.max_length_argument,
        sampler=args.sampler,
        strip_prompt=not args.keep_prompt,
        score=args.score,
        card=ModelCard(
            base_model=args.base_model,
            method=args.method,
            languages=args.languages,
            data=args.data,
            report=args.report,
            report_method=args.report_method,
            licence=args.licence,
        ),
        **warmup,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
