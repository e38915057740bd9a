import keras
from keras import ops

from keras_cc.objectives.objective import Objective
from keras_cc.options import choice, number

TEACHERS = ("connected", "in_context", "pivot")
DIVERGENCES = ("forward", "reverse")


@keras.saving.register_keras_serializable(package="keras_cc")
class SelfDistillation(Objective):
    """What the model knows with English at hand, taught to the path that a user gets.

    With `q` the teacher's distribution of an answer's token and `p` the student's, float32
    `(batch, answer positions, vocabulary)`, both at temperature tau, and `sg` without a
    gradient:

        forward:  tau^2 mean_tokens KL(sg q || p),  KL(q || p) = sum_v q(v) log(q(v) / p(v))
        reverse:  tau^2 mean_tokens KL(p || sg q)

    Student is the monolingual pass, transform and all, over the target's prompt. Teacher
    is the same model, which reads more:

        "connected":   the connected pass, without connection dropout
        "in_context":  the target's prompt with the pivot's in front of it
        "pivot":       the pivot's prompt alone, for answers that are the same in both
                       languages

    This trains a transform on what it is for, the answer, instead of an error between
    activations. A teacher is only worth what it knows: compare its score with the
    student's (`evaluate` has `connected_sft_loss`). Rows without a pivot count nothing.

    Args:
        teacher: `"connected"` (needs a connection), `"in_context"` or `"pivot"`.
        divergence: `"forward"` (the student covers what the teacher holds possible) or
            `"reverse"` (it keeps to what the teacher holds likely).
        temperature: float > 0, tau.
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

    Source: context distillation, Snell et al., arXiv 2209.15189; the divergence at a
    temperature is Hinton et al.'s, arXiv 1503.02531. With the connected pass as the
    teacher it is ours.
    """

    name = "self_distillation"
    counts = "answer_tokens"
    learns_from_prompts = False

    def __init__(
        self,
        teacher="connected",
        divergence="forward",
        temperature=1.0,
        weight=1.0,
        alternating=False,
    ):
        super().__init__(weight, alternating)
        self.teacher = choice("teacher", teacher, TEACHERS)
        self.divergence = choice("divergence", divergence, DIVERGENCES)
        self.temperature = number("temperature", temperature, positive=True)

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
        teacher = ops.stop_gradient(self._log_probabilities(states, self.teacher))
        student = self._log_probabilities(states, "student")
        of, by = (teacher, student) if self.divergence == "forward" else (student, teacher)
        divergence = ops.sum(ops.exp(of) * (of - by), axis=-1)
        values = ops.where(counted, self.temperature**2 * divergence, 0.0)
        return ops.sum(values, axis=1), ops.sum(ops.cast(counted, "float32"), axis=1)

    def _log_probabilities(self, states, name):
        return ops.log_softmax(ops.cast(states.logits(name), "float32") / self.temperature)

    def get_config(self):
        return {
            "teacher": self.teacher,
            "divergence": self.divergence,
            "temperature": self.temperature,
            **super().get_config(),
        }
