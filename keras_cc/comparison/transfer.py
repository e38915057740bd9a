import dataclasses
from typing import Any, ClassVar, Self

from keras_cc.comparison import relations
from keras_cc.comparison.experiment import UNTUNED, Training, file_digests
from keras_cc.demo import laboratory_preset
from keras_cc.options import count, number

#: Methods that bound the others: plain fine-tuning without the facts, and with them in every
#: language.
FLOOR, CEILING = "floor", "ceiling"
_FACTS = {FLOOR: "none", CEILING: "all"}


@dataclasses.dataclass(frozen=True)
class Transfer(Training):
    """A cell of the protocol `transfer`: what crosses of facts that only English has.

    Trained are, in the same shares at every step, whatever the method: English questions with
    their answers, of all items; the other languages' of the items of the part `train`; and, for
    methods that learn from them, pairs of prompts without an answer, of the part `pairs`. Items of
    the part `held_out` are shown in English alone. Scored are `pairs` and `held_out` in every
    language.

    Attributes:
        task: the relation that is asked, one of `keras_cc.comparison.relations.RELATIONS`.
        data: folder or file that it is read from, or None.
        unseen_languages: languages that are scored alone: no row of them is trained.
        facts: `"english"`: what is not `train` is answered in English alone. `"none"`: not even
            there, which is the floor. `"all"`: in every language, the ceiling. (As methods:
            `"floor"` and `"ceiling"`.)
        english_share: float, the share of rows in English.
        pair_share: float, the share of pairs without an answer, from `pairs_from` on; until then,
            and for methods that have no use for them, answered rows of the other languages come
            in their place.
        pairs_from: float in [0, 1], the share of the steps that pass before pairs come: a model
            learns the facts before it has something to borrow.
        items: int, how many facts of an invented relation, or of the laboratory's.
        score_on: `"dev"` items, to choose by, or `"test"` items.
        curve: int, how often learning curves are taken.

    The others are those of `keras_cc.comparison.experiment.Training`.

    Example:

    ```python
    keras_cc.comparison.Transfer.parse("floor", task="currency_code").facts  # "none"
    ```
    """

    steps: int = 150
    task: str = "currency_code"
    data: str | None = None
    unseen_languages: tuple[str, ...] = ()
    facts: str = "english"
    english_share: float = 0.4
    pair_share: float = 0.4
    pairs_from: float = 0.5
    items: int = 200
    score_on: str = "dev"
    curve: int = 5

    _choices: ClassVar = {
        **Training._choices,
        "task": relations.RELATIONS,
        "score_on": relations.SCORED_ON,
        "facts": ("english", "none", "all"),
    }
    _of_training: ClassVar = (
        *Training._of_training,
        "facts",
        "english_share",
        "pair_share",
        "pairs_from",
        "curve",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe != UNTUNED and self.resolve().augment is not None:
            raise ValueError(
                "`recipe` must leave the rows as they are, since all methods get the same ones; "
                "'own_answers' has the model answer prompts that have no answer. "
                f"Received: recipe={self.recipe!r}"
            )
        count("steps", self.steps, least=1)
        count("items", self.items, least=1)
        count("curve", self.curve)
        for name in ("english_share", "pair_share", "pairs_from"):
            number(name, getattr(self, name), most=1)
        if self.english_share + self.pair_share > 1 - 1e-9 or not self.english_share:
            raise ValueError(
                "`english_share` must be above 0, and with `pair_share` below 1: the rest is the "
                f"other languages'. Received: english_share={self.english_share}, "
                f"pair_share={self.pair_share}"
            )
        twice = set(self.languages) & set(self.unseen_languages)
        if twice or len(self.languages) < 2:
            raise ValueError(
                "`languages` must be English and others to train, `unseen_languages` none of them. "
                f"Received: languages={self.languages}, unseen_languages={self.unseen_languages}"
            )

        relations.check_laboratory(self.task, self.model, self.every_language, self.items)

    @classmethod
    def parse(cls, method: str, **settings: Any) -> Self:
        first, *rest = method.split()
        if first in _FACTS:
            settings["facts"] = _FACTS[first]
            method = " ".join(["sft", *rest])
        return super().parse(method, **settings)

    def resolve(self):
        recipe = super().resolve()
        if "start" in self.options or self.recipe == UNTUNED:
            return recipe
        # Own answers are made when there is something to answer; what is asked in turn is
        # practised before.
        for objective in recipe.objectives():
            if "start" in objective.get_config():
                before = objective.refresh if objective.teacher == "in_turn" else 0
                start = max(0, self.pairs_after - (before or 0))
                return recipe.with_options({"start": start})
        return recipe

    @property
    def asks_in_turn(self) -> bool:
        """Whether a prompt may have the English one and an answer to it in front."""
        if self.recipe == UNTUNED:
            return False
        return any(getattr(o, "teacher", "") == "in_turn" for o in super().resolve().objectives())

    @property
    def pairs_after(self) -> int:
        """The number of steps that pass before pairs come."""
        return round(self.steps * self.pairs_from)

    @property
    def name(self) -> str:
        name = super().name
        bounds = {facts: bound for bound, facts in _FACTS.items()}
        if self.facts not in bounds or self.recipe == UNTUNED:
            return name
        return bounds[self.facts] if name == "sft" else f"{bounds[self.facts]} of {name}"

    @property
    def every_language(self) -> tuple[str, ...]:
        """Trained and unseen languages."""
        return (*self.languages, *self.unseen_languages)

    def load_rows(self) -> dict[str, Any]:
        """The rows, as `keras_cc.comparison.relations.load_relation` gives them."""
        return relations.load_relation(
            self.task, self.every_language, self.score_on, data=self.data, items=self.items
        )

    def _own_facts(self) -> dict[str, Any]:
        digests = None
        if self.data is not None:
            digests = file_digests(self.data, self.task, self.every_language)
        found = {"protocol": "transfer", "data_digest": digests}
        if self.model == relations.LABORATORY:
            found["laboratory"] = laboratory_preset.fingerprint()
        return found
