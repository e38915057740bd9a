import keras
from keras import ops

from keras_cc.interventions.intervention import Intervention
from keras_cc.objectives.objective import pool
from keras_cc.options import block, block_number
from keras_cc.passes import positions

#: How many tokens at the start of a prompt are left out of its mean: the attention sink.
SINK_TOKENS = 1


@keras.saving.register_keras_serializable(package="keras_cc")
class Shift(Intervention):
    """The states of a language are moved to where English's lie, for a window of layers.

        h_i  <-  h_i + (e_l,i - v_l,i)    at the output of block i, `first_layer`
        h_j  <-  h_j - (e_l,j - v_l,j)    at the output of block j, `last_layer`

    at every token, of the prompt and of what is generated. `v_l,n` is the mean of language l's
    prompts at the output of block n, `e_l,n` that of the same prompts in English; a prompt's own is
    the mean over its tokens after the first. Nothing is changed until `CCCausalLM.fit_transform`
    takes the means, in one pass, from paired rows with their `lang`.

    The language of a prompt is the one with the nearest mean at five sixths of the depth, English
    among them, whose prompts stay as they are. That takes a pass over the prompt before. Where
    there is one `language` alone, name it: nothing has to be found out, and `merge()` can add the
    two vectors to the biases of the feed-forward projections in blocks i and j, in families that
    have biases there (GPT-2, OPT, BLOOM, GPT-NeoX).

    Args:
        first_layer: int, block number `i`; negative numbers count from the end.
        last_layer: int, block number `j`, behind `i`.
        language: None, or the code of the language that all prompts are in.
        languages: codes of the languages whose means are known. `fit_transform` sets them.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    model = keras_cc.CCCausalLM(causal_lm, connection=None)
    model.intervention = keras_cc.Shift(first_layer=2, last_layer=5)
    model.fit_transform([dict(row, lang="tr") for row in rows])
    model.compile(sampler="greedy")
    model.generate("Kenya'nın para birimi nedir?", max_length=32)
    ```

    Source: LRP2 (Xu et al., EMNLP 2023, arXiv 2311.03788), and the shift of ShifCon (Zhang et al.,
    ACL 2025, arXiv 2410.19453), which is there in training too. Both know the language of a prompt;
    to tell it by the nearest mean is ours. In Gemma 3 270M, seven languages, means of 96 questions
    each: right for 100 % of other questions of the same kind and 98 % of other kinds, at block 15
    of 18; in the middle of the depth, for about half of those.
    """

    swept_options = ("first_layer", "last_layer")

    def __init__(self, first_layer, last_layer, language=None, languages=()):
        super().__init__("hidden")
        self.first_layer = block("first_layer", first_layer)
        self.last_layer = block("last_layer", last_layer)
        if language is not None and (not isinstance(language, str) or not language):
            raise ValueError(
                f"`language` must be a language code or None. Received: language={language!r}"
            )
        self.language = language
        self.languages = self._known(languages)

    def check(self, num_blocks):
        first, last = self._window(num_blocks)
        if first >= last:
            raise ValueError(
                "`last_layer` must be behind `first_layer`, in a model of "
                f"{num_blocks} blocks. Received: first_layer={self.first_layer}, "
                f"last_layer={self.last_layer}"
            )

    def build(self, num_blocks, dim):
        if not self.languages:
            return
        shape = (num_blocks, dim)
        if self.matrices:  # taken off a model, and set again
            here = (len(self.matrices), int(self.matrices[0].shifts.shape[1]))
            if here != shape:
                raise ValueError(
                    f"`intervention` has means of {here[0]} blocks of width {here[1]}: make a new "
                    f"one. Received: a model with {num_blocks} blocks of width {dim}"
                )
            return
        for number in range(num_blocks):
            has_means = number == told_at(num_blocks)
            layer = _LanguageVectors(
                len(self.languages), has_means, dtype="float32", name=f"shift_{number}"
            )
            layer.build((None, dim))
            self.matrices[number] = layer

    def learn(self, languages, num_blocks, dim):
        """Make the layers that hold the means of these languages, zeros; others are dropped."""
        self.languages = self._known(languages)
        self.matrices = {}
        self.build(num_blocks, dim)

    def sites(self, num_blocks):
        if not self.languages or self.language is not None:
            return set()
        return {("hidden", told_at(num_blocks))}

    def read(self, value, prompt, last):
        return pool(value, positions.beyond(prompt, SINK_TOKENS), "mean")

    def edit(self, scope, where, states, swept=None):
        if not self.languages:
            return
        num_blocks = len(self.matrices)
        if swept is None:
            first, last = self._window(num_blocks)
            numbers = (first, last)
        else:
            options = ops.cast(swept[0], "int32") % num_blocks
            first, last = options[0], options[1]
            numbers = range(num_blocks)
        own = self._own(states, num_blocks)  # (B or 1, languages)
        for number in numbers:
            sign = ops.cast(ops.equal(number, first), "float32")
            sign = sign - ops.cast(ops.equal(number, last), "float32")
            shift = sign * ops.matmul(own, self.matrices[number].shifts)

            def move(value, shift=shift):
                return value + ops.cast(shift, value.dtype)[:, None]

            scope.edit(("hidden", number), move)

    def constants(self, num_blocks):
        """The two vectors that are added where the language is named: block number to `(d,)`."""
        if self.language is None or not self.languages:
            return None
        first, last = self._window(num_blocks)
        own = self.languages.index(self.language)
        return {
            number: sign * ops.convert_to_numpy(self.matrices[number].shifts)[own]
            for number, sign in ((first, 1.0), (last, -1.0))
        }

    def _own(self, states, num_blocks):
        """Which language each row is in, one-hot; zeros for the pivot's."""
        if self.language is not None:
            return ops.one_hot([self.languages.index(self.language)], len(self.languages))
        prompt = ops.cast(states["hidden", told_at(num_blocks)], "float32")
        difference = prompt[:, None] - self.matrices[told_at(num_blocks)].means[None]
        nearest = ops.argmin(ops.sum(ops.square(difference), axis=-1), axis=-1)
        return ops.one_hot(nearest, len(self.languages) + 1)[:, 1:]

    def _window(self, num_blocks):
        return tuple(block_number(n, getattr(self, n), num_blocks) for n in self.swept_options)

    def _known(self, languages):
        languages = _codes(languages)
        if self.language is not None and languages and self.language not in languages:
            raise ValueError(
                f"`language` must be one of those whose means are known, {languages}. "
                f"Received: language={self.language!r}"
            )
        return languages

    def get_config(self):
        return {
            "first_layer": self.first_layer,
            "last_layer": self.last_layer,
            "language": self.language,
            "languages": list(self.languages),
        }


def told_at(num_blocks):
    """The block at whose output the language of a prompt is told."""
    return num_blocks * 5 // 6


class _LanguageVectors(keras.layers.Layer):
    """Of one block: `shifts` `(languages, d)`, from each language to its pivots; where the language
    is told, `means` `(1 + languages, d)`, the pivot's first. No training changes them."""

    def __init__(self, languages, has_means, **kwargs):
        super().__init__(**kwargs)
        self.languages, self.has_means = languages, has_means

    def build(self, input_shape):
        self.shifts = self._vectors("shifts", self.languages, input_shape[-1])
        if self.has_means:
            self.means = self._vectors("means", self.languages + 1, input_shape[-1])

    def _vectors(self, name, count, dim):
        return self.add_weight(name=name, shape=(count, dim), initializer="zeros", trainable=False)


def _codes(languages):
    codes = tuple(languages) if isinstance(languages, (list, tuple)) else (languages,)
    if not all(isinstance(code, str) and code for code in codes) or len(set(codes)) < len(codes):
        raise ValueError(
            "`languages` must be language codes, each once, such as ('sw', 'tr'). "
            f"Received: languages={languages!r}"
        )
    return codes
