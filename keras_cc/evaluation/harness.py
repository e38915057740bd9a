"""`KerasLM`: a KerasHub model for EleutherAI's lm-evaluation-harness.

Notable choices:

- Text becomes ids as the harness' own Hugging Face models do it (`TemplateLM._encode_pair`, cut on
  the left, rolling windows), so that figures can be compared. One thing differs: a rolling
  log-likelihood starts from the start token and never scores it.
- Greedy decoding alone: figures that can be repeated.
- Importing this module registers the model as "keras". It is imported when it is asked for:
  `keras_cc.evaluation.KerasLM`.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.evaluation.chat import ConversationEncoder
from keras_cc.evaluation.greedy import GreedyGenerator
from keras_cc.evaluation.scorer import Scorer
from keras_cc.options import count
from keras_cc.preprocessing import CCPreprocessor, templates
from keras_cc.presets import load_preset

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "`keras_cc.evaluation.KerasLM` needs the lm-evaluation-harness. Install it with: "
        'pip install "keras-cc[evaluation]"',
        name=error.name,
    ) from error

#: Context and continuation together, where the model sets no limit: the harness' own default.
DEFAULT_MAX_LENGTH = 2048
# Generation options of a task that mean nothing where the likeliest token is taken.
_OF_SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}


@register_model("keras")
class KerasLM(TemplateLM):
    """A causal language model of KerasHub or `keras_cc` as a model of the lm-evaluation-harness.

    It is scored as a user gets it: the monolingual path of a connected model, with its
    intervention if it has one. Nothing here needs torch on the other backends.

    Args:
        model: a `keras_hub.models.CausalLM` or a `CCCausalLM`. Make a new `KerasLM` where it gets
            another connection or intervention later.
        preprocessor: a `CCPreprocessor`, a KerasHub preprocessor or tokenizer. Default: the
            model's.
        batch_size: int, requests a batch.
        max_length: int, tokens of a context and its continuation together. Default: the model's
            positions, where they have an end, else 2048. What is longer is cut on the left,
            counted and said.
        max_gen_toks: int, tokens that are generated where a task does not say.
        template: the chat template for `apply_chat_template=True`, as in
            `keras_cc.templates.get`. Default: the preprocessor's own, if it is a `CCPreprocessor`.
        add_start_token: bool, whether text begins with the start token. Default: the
            preprocessor's own setting. (An empty context is the start token in any case, or the
            end token of a tokenizer that has none.)
        verbose: 0 for no progress bars.

    Attributes:
        truncated_count: int, the number of requests that were cut so far.

    Raises:
        TypeError: if `model` is no causal language model.
        ValueError: without a tokenizer, for a number that is none or too large, or an
            intervention that reads the pivot, which the harness does not have.

    Example:

    ```python
    import lm_eval
    import keras_cc

    causal_lm, tokenizer = keras_cc.load_preset("demo:gemma3_270m")
    lm = keras_cc.evaluation.KerasLM(causal_lm, batch_size=16)
    found = lm_eval.simple_evaluate(lm, tasks=["xnli_tr", "xcopa_tr"])
    found["results"]["xnli_tr"]["acc,none"]
    ```

    By name, once `keras_cc.evaluation.KerasLM` was asked for:
    `lm_eval.simple_evaluate("keras", "preset=gemma3_270m,dtype=bfloat16", ...)`.

    Source: https://github.com/EleutherAI/lm-evaluation-harness (`lm_eval/api/model.py`,
    `lm_eval/models/huggingface.py`), version 0.4.13.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Any = None,
        *,
        batch_size: int = 8,
        max_length: "int | None" = None,
        max_gen_toks: int = 256,
        template: Any = "auto",
        add_start_token: "bool | None" = None,
        verbose: "int | str" = "auto",
    ) -> None:
        super().__init__()
        if preprocessor is None:
            preprocessor = getattr(model, "preprocessor", None)
        if not isinstance(model, CCCausalLM):
            model = CCCausalLM(model, connection=None, preprocessor=None)
        self.preprocessor = _text_preprocessor(preprocessor, template, add_start_token)
        intervention = model.intervention
        if intervention is not None and intervention.needs_pivot:
            raise ValueError(
                "`model` must do without the pivot's prompts: the harness has none for "
                f"{intervention!r}. Set `model.intervention = None`, or evaluate with "
                "`keras_cc.evaluation.Scorer`, which takes pivots."
            )
        self.model = model
        self.scorer = Scorer(model, self.preprocessor, batch_size=batch_size, verbose=verbose)
        limit = self.scorer.max_length
        if max_length is None:
            max_length = limit or DEFAULT_MAX_LENGTH
        self._max_length = count("max_length", max_length, least=1)
        if limit is not None and self._max_length > limit:
            raise ValueError(
                f"`max_length` must be at most {limit}, the positions that the model has. "
                f"Received: max_length={max_length}"
            )
        self.max_gen_toks = count("max_gen_toks", max_gen_toks, least=1)
        self.verbose = self.scorer.verbose
        self.truncated_count = 0
        self._chat = ConversationEncoder(self.preprocessor)
        self._generator = GreedyGenerator(
            model, self.preprocessor, batch_size=batch_size, max_length=self._max_length
        )

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        """What `model_args="preset=...,template=gemma"` stands for; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """Load a model and wrap it.

        Args:
            arg_dict: `preset`, and options of `KerasLM`. A preset is what
                `keras_cc.load_preset` takes (a KerasHub preset or `demo:smollm2_135m`), or a
                file `*.keras` that `CCCausalLM.save` wrote. `dtype`: the backbone's.
            additional_config: the harness' own `batch_size`; its `device` and `max_batch_size`
                must be None.

        Raises:
            ValueError: without a preset, or for what Keras decides elsewhere.
        """
        given = {**(additional_config or {}), **arg_dict}
        options = {name: value for name, value in given.items() if value is not None}
        for name in {"device", "max_batch_size"} & set(options):
            raise ValueError(
                f"`{name}` must be left out: Keras places a model where its backend does, and "
                f"`batch_size` is a fixed number. Received: {name}={options[name]!r}"
            )
        if "preset" not in options:
            raise ValueError(
                '`model_args` must have a preset: "preset=gemma3_270m", "preset=model.keras". '
                f"Received: model_args={dict(arg_dict)}"
            )
        if str(options.get("batch_size")).isdecimal():  # a string where it came from a command line
            options["batch_size"] = int(options["batch_size"])
        model, preprocessor = _load(str(options.pop("preset")), options.pop("dtype", None))
        return cls(model, preprocessor, **options)

    # ---------------------------------------------------------------- what the harness asks for

    @property
    def tokenizer(self) -> Any:
        """The KerasHub tokenizer."""
        return self.preprocessor.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens of a context and its continuation together."""
        return self._max_length

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.end_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the start token, else the end token."""
        start = self._chat.start_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """Name of tokenizer and chat template, by which the harness keeps prompts (in files)."""
        template = self.preprocessor.template
        digest = hashlib.sha256(repr(template).encode()).hexdigest()[:8]
        name = "none" if template is None else re.sub(r"\W+", "_", template.name)[:32]
        return f"{type(self.tokenizer).__name__}-{name}-{digest}"

    def chat_template(self, chat_template: "bool | str" = False) -> "str | None":
        """The chat template as text, for the harness' records; None where it is not applied."""
        if not chat_template:
            return None
        template = self.preprocessor.template
        if isinstance(chat_template, str) and templates.get(chat_template) != template:
            raise ValueError(
                "`apply_chat_template` must be True or the template of this model: pass another "
                f"as `template=` to `KerasLM`. Received: apply_chat_template={chat_template!r}"
            )
        return self.apply_chat_template([{"role": "user", "content": templates.PLACEHOLDER}])

    def apply_chat_template(
        self, chat_history: "Sequence[Mapping[str, str]]", add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to the model's answer, or to where it goes on.

        Args:
            chat_history: `{"role": ..., "content": ...}` dicts.
            add_generation_prompt: bool. False: the last message is a begun answer.
        """
        return self._chat.format(chat_history, is_open=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: "bool | None" = None, **_: Any):
        """The ids of a text, with the start token or not; `None`: as the model is used to it."""
        return self._chat.encode(string, add_special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores beside the results."""
        return {
            "model_class": type(self.model.causal_lm).__name__,
            "model_connection": repr(self.model.connection),
            "model_intervention": repr(self.model.intervention),
            "model_num_parameters": int(self.model.causal_lm.count_params()),
            "model_dtype": self.model.causal_lm.backbone.dtype_policy.name,
            "template": templates.serialize(self.preprocessor.template),
            "add_start_token": self.preprocessor.add_start_token,
            "max_length": self.max_length,
            "truncated_requests": self.truncated_count,
            "keras_version": keras.version(),
            "keras_backend": keras.backend.backend(),
        }

    # ---------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests, disable_tqdm=False):
        """`(log-likelihood, is greedy)` of each request `(context, continuation)`.

        Tokenised together, and cut where the context's own tokens end, as the harness does it.

        Raises:
            ValueError: for a continuation that is empty, or of which nothing is left there, since
                the context's last token has taken it in.
        """
        for request in requests:
            if "" in request.args[1:]:
                raise ValueError(
                    "A continuation must not be empty: there is nothing to score. "
                    f"Received: context={request.args[0]!r}, continuation=''"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.verbose)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        most, cut = self.max_length + 1, 0
        pairs = []
        for text, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    "A continuation must have a token of its own, and the context's last token "
                    "takes this one in: part the texts between words, or score the whole with "
                    f"`loglikelihood_rolling`. Received: (context, continuation)={text!r:.300}"
                )
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"`max_length` must be at least {len(continuation)}, the tokens of the longest "
                    "continuation: it is never cut. Make a `KerasLM` with a larger one. "
                    f"Received: max_length={self.max_length}"
                )
            # No start token, and nothing but spaces, which went to the continuation.
            context = context or [self.prefix_token_id]
            room = most - len(continuation)
            cut += len(context) > room
            pairs.append((context[-room:], continuation))
        self._say_truncated(cut, len(pairs))
        found: list[Any] = [None] * len(pairs)
        for number, result in self.scorer.as_scored(pairs):
            found[number] = (result.total, result.is_greedy)
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-likelihood of each request's whole text, in windows of `max_length` tokens."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolled = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolled):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _say_truncated(self, cut, count):
        self.truncated_count += cut
        if cut:
            warnings.warn(
                f"{cut} of {count} requests are longer than `max_length`, {self.max_length} "
                "tokens: their contexts were cut on the left.",
                stacklevel=3,
            )

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests, disable_tqdm=False):
        """The greedy continuation of each request `(context, options)`, up to a stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found: list[Any] = [None] * len(requests)
        verbose = 0 if disable_tqdm else self.verbose
        progress = keras.utils.Progbar(len(requests), unit_name="request", verbose=verbose)
        for options, numbers in groups.items():
            until, count = self._stopping(json.loads(options))
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            room = self.max_length - count
            self._say_truncated(sum(len(ids) > room for ids in contexts), len(contexts))
            contexts = [ids[-room:] or [self.prefix_token_id] for ids in contexts]
            for i, text in self._generator.as_continued(contexts, until, count):
                found[numbers[i]] = text
                self.cache_hook.add_partial("generate_until", requests[numbers[i]].args, text)
                progress.add(1)
        return found

    def _stopping(self, generation_kwargs):
        """`(stop strings, most tokens)` of a task's generation options."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(generation_kwargs, self.max_gen_toks))
        count, until = options.pop("max_gen_toks"), options.pop("until")
        if options.get("do_sample"):
            raise ValueError(
                "`do_sample` must be False: `KerasLM` takes the likeliest token, so that figures "
                "can be repeated. Pass gen_kwargs={'do_sample': False, 'temperature': 0.0} to the "
                f"harness. Received: {options}"
            )
        if options.get("num_beams") == 1:  # greedy, said in the words of beam search
            del options["num_beams"]
        unknown = set(options) - _OF_SAMPLING
        if unknown:
            raise ValueError(
                "`generation_kwargs` must be of `until`, `max_gen_toks` and those of sampling, "
                f"which are off. Received: {sorted(unknown)}"
            )
        if not 0 < count < self.max_length:
            raise ValueError(
                "`max_gen_toks` must be positive and less than `max_length`, to leave room for a "
                f"context. Received: max_gen_toks={count}, max_length={self.max_length}"
            )
        return [text for text in until if text], count


def _text_preprocessor(source, template, add_start_token):
    """The `CCPreprocessor` that has the chat template and knows whether text has a start token."""
    own = isinstance(source, CCPreprocessor)
    if source is None:
        raise ValueError(
            "`preprocessor` must be given for a model without one: `KerasLM(model, tokenizer)`. "
            "Received: preprocessor=None"
        )
    if template == "auto":
        template = source.template if own else None
    if add_start_token is None and own:
        add_start_token = source.add_start_token
    inner = source.preprocessor if own else source
    return CCPreprocessor(inner, template=template, add_start_token=add_start_token)


def _load(preset, dtype):
    """`(model, preprocessor or None)` of a preset or a `.keras` file."""
    if preset.endswith(".keras"):
        if dtype is not None:
            raise ValueError(
                f"`dtype` must be left out for a saved model, which has one. Received: {dtype!r}"
            )
        return keras.models.load_model(preset), None
    model, tokenizer = load_preset(preset, dtype=dtype)
    return model, tokenizer if model.preprocessor is None else None
