import keras
from keras import ops

from keras_cc.losses import token_cross_entropy
from keras_cc.objectives.objective import Objective
from keras_cc.options import choice, count, flag, number

TEACHERS = ("connected", "in_context", "pivot", "in_turn")
DIVERGENCES = ("forward", "reverse", "labels")


@keras.saving.register_keras_serializable(package="keras_cc")
class SelfDistillation(Objective):
    """What the model knows with English at hand, taught to the path that a user gets.

    With `q` the teacher's distribution of an answer's token and `p` the student's, float32
    `(batch, answer positions, vocabulary)`, both at temperature tau, and `sg` without a
    gradient:

        forward:  tau^2 mean_tokens KL(sg q || p),  KL(q || p) = sum_v q(v) log(q(v) / p(v))
        reverse:  tau^2 mean_tokens KL(p || sg q)
        labels:   - mean_tokens log p(y),  y the teacher's own greedy answer

    Student is the monolingual pass, transform and all, over the target's prompt. Teacher
    is the same model, which reads more:

        "connected":   the connected pass, without connection dropout
        "in_context":  the target's prompt with the pivot's in front of it
        "pivot":       the pivot's prompt alone, for answers that are the same in both
                       languages
        "in_turn":     the pivot's prompt, the model's own answer to it, and then the target's
                       prompt, for answers that are other words in each language (with
                       "labels" alone)

    This trains a transform on what it is for, the answer, instead of an error between
    activations. A teacher is only worth what it knows: compare its score with the
    student's (`evaluate` has `connected_sft_loss`). Rows without a pivot count nothing.

    With `refresh`, pairs of prompts without an answer take part: the teacher answers them
    greedily and is then the teacher of its own answer's tokens. The answers are made in one
    go, kept, and made anew every `refresh` steps; those that come out empty, do not end in
    `max_new_tokens` or have no room are left out, and counted at the end of `fit`. Without,
    such pairs count nothing.

    Args:
        teacher: `"connected"` (needs a connection), `"in_context"`, `"pivot"` or `"in_turn"`.
        divergence: `"forward"` (the student covers what the teacher holds possible),
            `"reverse"` (it keeps to what the teacher holds likely), or `"labels"`: the
            teacher's words alone, cross-entropy on its own answers (needs `refresh`; rows
            with an answer count nothing).
        temperature: float > 0, tau; 1 for `"labels"`.
        refresh: int, training steps (batches) from one making of the own answers to the next,
            or None: rows without an answer have none.
        start: int, the steps that pass before the first one: a model that has not learnt the
            task yet has little to teach.
        max_new_tokens: int, the most tokens of such an answer, its end token included.
        practice: float in [0, 1], for `"in_turn"`: the share of the rows with an answer and a
            pivot that are asked in turn, so that the model learns to say in the target's language
            what it has just said in the pivot's. It begins at `start`; `refresh` steps later the
            first rows without an answer get theirs.
        least_confidence: float in [0, 1]: an own answer is taught while the teacher holds each of
            its tokens at least so likely, and counts 0 otherwise. A teacher that is not sure yet
            would be held to what it got wrong: what it learns later is against its own student.
            Not for `"labels"`, where no teacher is asked while the student learns.
        answered: bool, whether rows that have an answer are taught by the teacher too, beside
            their own; False needs `refresh`. A teacher that reads English is against a row whose
            answer is a word of another language. `"labels"` leaves such rows alone in any case.
        weight: float >= 0, the loss's weight beside the task loss.
        alternating: bool, whether steps take turns with the task loss.

    Raises:
        ValueError: naming the option, what it takes and what was received; from
            `CCCausalLM`, for the teacher `"connected"` without a connection.

    Example:

    ```python
    connection = keras_cc.FusedConnection(alignment="last", dropout=0.0)
    model = keras_cc.CCCausalLM(causal_lm, connection, keras_cc.SelfDistillation())
    ```

    Source: with `divergence="labels"`, `teacher="pivot"`: SDRRL, arXiv 2402.12204, made
    anew while training; context distillation, Snell et al., arXiv 2209.15189; the divergence at a
    temperature is Hinton et al.'s, arXiv 1503.02531. With the connected pass as the
    teacher it is ours.
    """

    name = "self_distillation"

    def __init__(
        self,
        teacher="connected",
        divergence="forward",
        temperature=1.0,
        weight=1.0,
        alternating=False,
        refresh=None,
        start=0,
        max_new_tokens=32,
        practice=0.5,
        least_confidence=0.0,
        answered=True,
    ):
        super().__init__(weight, alternating)
        self.teacher = choice("teacher", teacher, TEACHERS)
        self.divergence = choice("divergence", divergence, DIVERGENCES)
        self.temperature = number("temperature", temperature, positive=True)
        self.refresh = refresh if refresh is None else count("refresh", refresh, least=1)
        self.start = count("start", start)
        self.max_new_tokens = count("max_new_tokens", max_new_tokens, least=2)
        self.practice = number("practice", practice, most=1)
        self.least_confidence = number("least_confidence", least_confidence, most=1)
        self.answered = flag("answered", answered)
        if not self.answered and refresh is None:
            raise ValueError(
                "`answered` can be False with `refresh` alone, or there is no row to teach. "
                f"Received: answered={answered!r}, refresh=None"
            )
        if self.least_confidence and divergence == "labels":
            raise ValueError(
                "`least_confidence` must be 0 for 'labels': no teacher is asked while the student "
                f"learns. Received: least_confidence={least_confidence!r}"
            )
        if teacher == "in_turn" and divergence != "labels":
            raise ValueError(
                "`divergence` must be 'labels' with the teacher 'in_turn', whose context has an "
                f"answer of its own in it. Received: divergence={divergence!r}"
            )
        if divergence == "labels" and (refresh is None or self.temperature != 1):
            raise ValueError(
                "`divergence` can be 'labels' with `refresh`, which makes them, and temperature "
                f"1. Received: refresh={refresh!r}, temperature={temperature!r}"
            )

    @property
    def counts(self):
        return "own_answer_tokens" if self._own_alone else "answer_tokens"

    @property
    def _own_alone(self):
        return self.divergence == "labels" or not self.answered

    @property
    def learns_from_prompts(self):
        return self.refresh is not None

    def check(self, connection):
        if self.teacher == "connected" and connection is None:
            raise ValueError(
                "`teacher` can be 'connected' for a model with a connection alone: give it one, or "
                "take 'in_context' or 'pivot'. Received: teacher='connected', connection=None"
            )

    def target_blocks(self, num_blocks):
        return ()

    def pivot_blocks(self, num_blocks):
        return ()

    def __call__(self, states):
        counted = ops.logical_and(states.answer_mask, states.has_pivot[:, None])
        if self._own_alone:
            counted = ops.logical_and(counted, states.is_own[:, None])
        if self.divergence == "labels":
            values = token_cross_entropy(states.logits("student"), states.labels)
            return row_sums(values, counted)
        teacher = ops.stop_gradient(self._log_probabilities(states, self.teacher))
        student = self._log_probabilities(states, "student")
        of, by = (teacher, student) if self.divergence == "forward" else (student, teacher)
        values = self.temperature**2 * divergence(of, by)
        if self.least_confidence:
            taught = self._is_taught(states, counted)
            values = ops.where(taught[:, None], values, 0.0)
        return row_sums(values, counted)

    def _is_taught(self, states, counted):
        """Bool `(B,)`: all rows but own answers with a token that the teacher is not sure of."""
        likely = ops.exp(-token_cross_entropy(states.logits(self.teacher), states.labels))
        least = ops.min(ops.where(counted, likely, 1.0), axis=1)
        return ops.logical_or(least >= self.least_confidence, ops.logical_not(states.is_own))

    def _log_probabilities(self, states, name):
        return ops.log_softmax(ops.cast(states.logits(name), "float32") / self.temperature)

    def get_config(self):
        return {
            "teacher": self.teacher,
            "divergence": self.divergence,
            "temperature": self.temperature,
            "refresh": self.refresh,
            "start": self.start,
            "max_new_tokens": self.max_new_tokens,
            "practice": self.practice,
            "least_confidence": self.least_confidence,
            "answered": self.answered,
            **super().get_config(),
        }


def divergence(of, by):
    """KL(of || by) at each token, of log-probabilities `(B, K, vocabulary)`."""
    return ops.sum(ops.exp(of) * (of - by), axis=-1)


def row_sums(values, counted):
    """What an objective gives, of values `(B, K)` and which of them count."""
    values = ops.sum(ops.where(counted, values, 0.0), axis=1)
    return values, ops.sum(ops.cast(counted, "float32"), axis=1)
