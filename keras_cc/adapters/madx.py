"""MAD-X: a language and a task in adapters of their own, so that languages can be swapped.

Notable choices:

- The model holds one language's adapters at a time. Those of the others are kept here, as NumPy
  arrays, and swapped in by assignment, so nothing is compiled anew for another language.
- Adapters start as the identity; those that still are it have not been trained.
"""

import re
from collections.abc import Iterable
from typing import Any

from keras_cc import cc_weights
from keras_cc.backbones import adapting, surgery
from keras_cc.options import choice, count

_TASK = "task"


class MADX:
    """Language adapters and task adapters for a KerasHub causal language model.

        h    = token embeddings, through the language's `InvertibleAdapter`
        F_l  = task(language(F_l))            the feed-forward activation of every block l
        head: logits = E^T inverse(h_L)       h_L after the final norm, E the token embedding

    Language adapters are trained on text of the language (`train_language`), task adapters on
    English rows with English's adapters below them (`train_task`); the model itself stays as it
    is. At inference the language is swapped (`language`) and the task's adapters stay. The model
    is changed in place, and any way to train or use it goes on working: its own `fit` and
    `generate`, or those of a `CCCausalLM(causal_lm, None)`. After `train_language` or `train_task`
    compile the model anew, since it trains other variables.

    In the paper's encoders an adapter reads the sum of feed-forward output and residual stream;
    decoders have no norm after that sum, and here it reads the feed-forward output alone, as the
    connections do. In each pass the inverse stands before the output embedding, tied or not; in
    the paper that is so in language training, since its tasks have heads of their own.

    Adapters are not linear, so `CCCausalLM.merge()` refuses to fold them.

    Args:
        causal_lm: a `keras_hub.models.CausalLM` with a backbone from
            `keras_cc.supported_backbones()`, not connected.
        reduction_factor: int, how many times narrower than the model a language's adapters are.
        task_reduction_factor: int, the same of the task's.
        invertible: bool, whether languages have an invertible adapter at the embedding, whose
            bottlenecks are d / 4 wide.

    Raises:
        ValueError: if the backbone is of no supported family, is connected or has adapters
            already, or an option has no such value.

    Example:

    ```python
    adapters = keras_cc.adapters.MADX(causal_lm)
    model = keras_cc.CCCausalLM(causal_lm, None, preprocessor=keras_cc.CCPreprocessor(tokenizer))
    texts = {"en": ["The capital of Kenya is Nairobi."], "tr": ["Kenya'nın başkenti Nairobi'dir."]}
    for language in texts:
        adapters.train_language(language)
        model.compile(keras.optimizers.Adam(1e-4))
        model.fit(keras_cc.adapters.text_rows(texts[language]), verbose=0)
    adapters.train_task()
    model.compile(keras.optimizers.Adam(1e-4), sampler="greedy")
    model.fit([{"instruction": "The capital of Kenya?", "output": "Nairobi"}], verbose=0)
    adapters.language = "tr"
    model.generate("Kenya'nın başkenti?", max_length=16)
    ```

    Source: MAD-X (Pfeiffer et al., EMNLP 2020, arXiv 2005.00052).
    """

    def __init__(
        self,
        causal_lm: Any,
        *,
        reduction_factor: int = 2,
        task_reduction_factor: int = 16,
        invertible: bool = True,
    ) -> None:
        self._options = {
            "reduction_factor": count("reduction_factor", reduction_factor, least=1),
            "task_reduction_factor": count("task_reduction_factor", task_reduction_factor, least=1),
            "invertible": choice("invertible", invertible, (True, False)),
        }
        self.causal_lm = causal_lm
        self._flags = surgery.trainable_flags(causal_lm)
        layers = adapting.adapt(causal_lm, **self._options)
        blocks = {path: layer for path, layer in layers.items() if path != "embedding"}
        of_language = {path: layer.language_adapter for path, layer in blocks.items()}
        if invertible:
            of_language["embedding"] = layers["embedding"]
        self._language = _Slot(of_language)
        self._task = _Slot({path: layer.task_adapter for path, layer in blocks.items()})
        self._slots = {"language": self._language, "task": self._task}
        surgery.train_only(causal_lm, [])

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages whose adapters have been trained or loaded, sorted."""
        return tuple(sorted(self._language.trained()))

    @property
    def language(self) -> "str | None":
        """The language whose adapters the model has, or None: those of no language.

        Set it to swap them.

        Raises:
            ValueError: for a language whose adapters have not been trained.
        """
        return self._language.name

    @language.setter
    def language(self, value: "str | None") -> None:
        self._check_attached()
        if value is not None and value not in self._language.trained():
            raise ValueError(
                "`language` must be one whose adapters have been trained (`train_language`) or "
                f"loaded, {list(self.languages)}, or None. Received: language={value!r}"
            )
        self._language.put(value)
        self._task.put(_TASK)

    def train_language(self, language: str) -> None:
        """From now on training changes the adapters of `language`, and nothing else.

        They go on from where they are, or start as the identity. The task's adapters are set
        aside meanwhile. Compile the model and fit it on text, see `text_rows`.

        Args:
            language: string, such as `"tr"`: what the adapters are known by.

        Raises:
            ValueError: for a `language` that is no such string.
        """
        self._check_attached()
        if not isinstance(language, str) or not re.fullmatch(r"[\w-]+", language):
            raise ValueError(
                '`language` must be a code such as "tr" or "pt-BR". '
                f"Received: language={language!r}"
            )
        self._language.put(language)
        self._task.put(None)
        surgery.train_only(self.causal_lm, self._language.variables.values())

    def train_task(self, language: "str | None" = "en") -> None:
        """From now on training changes the task's adapters, and nothing else.

        They go on from where they are, or start as the identity.

        Args:
            language: the language of the rows that follow, whose adapters stand below the task's,
                or None: there are none.

        Raises:
            ValueError: for a language whose adapters have not been trained.
        """
        self.language = language
        surgery.train_only(self.causal_lm, self._task.variables.values())

    def save(self, path: Any) -> None:
        """Save the adapters of all trained languages and of the task, their options beside.

        Args:
            path: a file name that ends in `.safetensors` or `.weights.h5`. The options are
                written to the same name with `.json` added.

        Raises:
            ValueError: for another ending, or if nothing has been trained.
        """
        weights = {
            f"{kind}/{name}/{key}": value
            for kind, slot in self._slots.items()
            for name, values in slot.trained().items()
            for key, value in values.items()
        }
        if not weights:
            raise ValueError("There are no trained adapters to save. Received: languages=()")
        cc_weights.write(path, weights, {"madx": self._options}, self.causal_lm.backbone)

    def load(self, path: Any) -> None:
        """Load what `save` wrote, beside the languages that are there or in their place.

        Args:
            path: the file that was saved.

        Raises:
            ValueError: if it was saved from another backbone or with other options, or its
                weights do not fit. Nothing has changed then.
        """
        self._check_attached()
        weights, options = cc_weights.read(path, self.causal_lm.backbone)
        if options.get("madx") != self._options:
            raise ValueError(
                f"`path` must hold adapters with the options {self._options}. "
                f"Received: options {options.get('madx')} in {str(path)!r}"
            )
        found: dict[Any, dict] = {}
        for full, value in weights.items():
            kind, name, key = ([*full.split("/", 2), "", ""])[:3]
            if kind not in self._slots:
                raise ValueError(
                    f"`path` must hold adapters of {sorted(self._slots)}. Received: {full!r}"
                )
            found.setdefault((kind, name), {})[key] = value
        for (kind, name), values in found.items():
            variables = self._slots[kind].variables
            if set(values) != set(variables):
                raise ValueError(
                    f"`path` must hold exactly the weights {sorted(variables)} of {name!r}. "
                    f"Received: {sorted(values)}"
                )
            cc_weights.check_shapes(path, values, variables)
        for (kind, name), values in found.items():
            self._slots[kind].give(name, values)

    def remove(self) -> Any:
        """Take the adapters out, and give the model back as it was.

        What has been trained is kept here: `save` still writes it.

        Returns:
            The KerasHub causal language model that was passed in.
        """
        self._check_attached()
        for slot in self._slots.values():
            slot.put(None)
        adapting.remove(self.causal_lm)
        for owner, trainable in self._flags:
            owner.trainable = trainable
        return self.causal_lm

    def _check_attached(self):
        if not surgery.is_adapted(self.causal_lm):
            raise ValueError(
                "The adapters have been removed: make new ones, `keras_cc.adapters.MADX(causal_lm)`"
                f". Received: causal_lm={self.causal_lm.name!r} without adapters"
            )


def text_rows(texts: Iterable[str]) -> list[dict[str, str]]:
    """Plain text as the rows that `CCCausalLM.fit` takes, to train a language's adapters on.

    A row's prompt is the first word (of a text without spaces, the first character), its answer
    all that follows; so they are for a preprocessor whose template adds nothing, the default.

    Args:
        texts: strings, each no longer than the preprocessor's `max_length`.

    Returns:
        A list of dicts, `instruction` and `output`; texts of less than two characters are left
        out.

    Raises:
        TypeError: for a single string.

    Example:

    ```python
    keras_cc.adapters.text_rows(["Kenya'nın başkenti Nairobi'dir."])
    # [{"instruction": "Kenya'nın", "output": " başkenti Nairobi'dir."}]
    ```
    """
    if isinstance(texts, str):
        raise TypeError(f"`texts` must be an iterable of strings. Received: texts={texts!r}")
    rows = []
    for text in (text.strip() for text in texts):
        end = text.find(" ") if " " in text else 1
        if text[end:]:
            rows.append({"instruction": text[:end], "output": text[end:]})
    return rows


class _Slot:
    """Layers that have the weights of one of several adapters at a time, or of none.

    Attributes:
        name: the adapter whose weights the layers have, or None: they are the identity.
        variables: the layers' variables by a path that is stable.
    """

    def __init__(self, layers):
        self.name = None
        self.variables = {
            f"{path}/{variable.name}": variable
            for path, layer in layers.items()
            for variable in layer.weights
        }
        self._identity = self._values()
        self._kept = {}

    def put(self, name):
        """Give the layers the weights of `name`, the identity's where there are none yet."""
        kept = self.trained()
        self._assign(kept.get(name, self._identity))
        self._kept, self.name = kept, name

    def give(self, name, values):
        """Have `values` be the weights of `name`."""
        if name == self.name:
            self._assign(values)
        else:
            self._kept[name] = values

    def trained(self):
        """The weights of each adapter that is not the identity, by its name."""
        kept = {name: values for name, values in self._kept.items() if name != self.name}
        if self.name is not None:
            kept[self.name] = self._values()
        return {name: values for name, values in kept.items() if _is_trained(values)}

    def _values(self):
        return {key: cc_weights.to_numpy(variable) for key, variable in self.variables.items()}

    def _assign(self, values):
        for key, value in values.items():
            self.variables[key].assign(value)


def _is_trained(values):
    return any(value.any() for key, value in values.items() if key.endswith(("up", "up_bias")))
