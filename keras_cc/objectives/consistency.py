import keras
from keras import ops

from keras_cc.objectives.self_distillation import SelfDistillation, divergence, row_sums

# Options of `SelfDistillation` that are no choice here.
_FIXED = ("teacher", "divergence", "practice", "least_confidence", "answered")


@keras.saving.register_keras_serializable(package="keras_cc")
class Consistency(SelfDistillation):
    """The same answer after both prompts: each of the two teaches the other.

    With `q` the distribution of an answer's token after the pivot's prompt alone and `p` that
    after the target's, float32 `(batch, answer positions, vocabulary)`, both at temperature
    tau, and `sg` without a gradient:

        tau^2 mean_tokens [KL(sg q || p) + KL(sg p || q)],  KL(q || p) = sum_v q(v) log(q(v) / p(v))

    `p` is the monolingual pass, transform and all; `q` goes around connection and transform, as
    an English row does. `SelfDistillation("pivot")` is the first of the two terms: there English
    alone teaches, here it learns too. The answer is teacher-forced after both prompts, so it
    should be one that fits both: an option, a number, a name that the languages share. Rows
    without a pivot count nothing. `refresh`, `start` and `max_new_tokens` give pairs of prompts
    without an answer the one that the model says after the pivot's, as in `SelfDistillation`.

    Where the target's prompt is a translation, that is xTune's augmentation by machine
    translation. Its code-switched prompts are a matter of the rows: `keras_cc.data.code_switch`
    puts a switched English prompt in the target's place and keeps the English one as the pivot.
    English rows are enough for it: each is its own pivot, under the language of the lexicon.
    xTune's other two augmentations (sampled subwords, noise on embeddings) and its second stage
    (a model taught by one that was trained without augmentation) are not here.

    Args:
        temperature: float > 0, tau.
        weight: float >= 0, the loss's weight beside the task loss.
        alternating: bool, whether steps take turns with the task loss.
        refresh, start, max_new_tokens: as in `keras_cc.SelfDistillation`.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    model = keras_cc.CCCausalLM(causal_lm, None, keras_cc.Consistency())
    english = [{"instruction": "Is the dog brown?", "output": "yes"}]
    pairs = [{**row, "instruction_en": row["instruction"], "lang": "tr"} for row in english]
    switched = keras_cc.data.code_switch(pairs, {"dog": "köpek", "brown": "kahverengi"}, ratio=0.5)
    rows = rows + english + switched  # "Is the dog kahverengi?" beside "Is the dog brown?"
    ```

    Source: xTune (Zheng et al., ACL 2021, arXiv 2106.08226), example consistency, for encoders
    and their classes; one answer's tokens after both prompts are what a decoder has for a class.
    """

    name = "consistency"

    def __init__(
        self,
        temperature=1.0,
        weight=1.0,
        alternating=False,
        refresh=None,
        start=0,
        max_new_tokens=32,
    ):
        super().__init__(
            teacher="pivot",
            temperature=temperature,
            weight=weight,
            alternating=alternating,
            refresh=refresh,
            start=start,
            max_new_tokens=max_new_tokens,
        )

    def __call__(self, states):
        counted = ops.logical_and(states.answer_mask, states.has_pivot[:, None])
        q, p = (self._log_probabilities(states, name) for name in ("pivot", "student"))
        both = divergence(ops.stop_gradient(q), p) + divergence(ops.stop_gradient(p), q)
        return row_sums(self.temperature**2 * both, counted)

    def get_config(self):
        config = super().get_config()
        return {name: config[name] for name in config if name not in _FIXED}
