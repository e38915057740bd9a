"""Recipes: CC-Tuning and every method it is compared with, each under one name.

A recipe combines four small ideas: a *connection* (what training changes in the forward pass),
*objectives* (extra losses on the pair), an *intervention* (a transform at inference), and a
change of the *data*. Whatever the name, the steps are the same:

    recipe = keras_cc.recipes.get("cc")
    model = recipe.model(causal_lm, preprocessor=preprocessor)
    model.compile(keras.optimizers.AdamW(1e-5))
    model.fit(recipe.data(model, rows))
    recipe.finish(model, rows, dev_rows)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.connections import FusedConnection, SelectedConnection
from keras_cc.data import augment_with_translation, cross_lingual_rows, pairs
from keras_cc.distillation import distill
from keras_cc.interventions import Incline, XTransplant
from keras_cc.interventions.search import search
from keras_cc.objectives import DFT, Consistency, Contrastive, SelfDistillation, TRepLiNa

#: What makes rows of rows alone, by the name of the change.
AUGMENTATIONS = {"translation": augment_with_translation, "cross_lingual": cross_lingual_rows}
#: What INCLINE sweeps sigma over, where there are development rows to choose by.
SIGMAS = tuple(round(-1 + 0.1 * step, 1) for step in range(21))
#: XTransplant tries this many source layers and target layers, evenly spaced.
LAYERS_TRIED = 6


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named combination of connection, objectives, intervention and data.

    Attributes:
        name: what `get` knows it by.
        changes: what it changes, in a few words.
        paper: where it comes from.
        claims: figures that its source reports, or an empty string.
        connection: a function that makes the connection, or None.
        objectives: a function that makes the objectives.
        intervention: a function that makes the intervention, or None.
        augment: a name in `AUGMENTATIONS`, `"distillation"` or None: what is done to the rows.
        fits: whether `finish` fits a transform in closed form.
    """

    name: str
    changes: str
    paper: str
    claims: str = ""
    connection: Callable[[], Any] | None = None
    objectives: Callable[[], tuple[Any, ...]] = tuple
    intervention: Callable[[], Any] | None = None
    augment: str | None = None
    fits: bool = False

    def with_options(self, options):
        """This recipe with other options.

        Args:
            options: a dict of options of its connection or of one of its objectives, each given
                to the part that has an option of that name.

        Returns:
            A `Recipe`.

        Raises:
            ValueError: for an option that no part has, or several have.

        Example:

        ```python
        keras_cc.recipes.get("cc").with_options({"dropout": 0.9, "layers": [4, 5]})
        ```
        """
        if not options:
            return self
        parts = [*([self.connection()] if self.connection else []), *self.objectives()]
        configs = [part.get_config() for part in parts]
        if not parts:
            raise ValueError(
                "`options` are those of a recipe's connection or objectives, and the recipe "
                f"{self.name!r} has none. Received: options={dict(options)}"
            )
        for name in options:
            holders = sum(name in config for config in configs)
            if holders != 1:
                known = sorted({key for config in configs for key in config})
                raise ValueError(
                    f"`options` must be of one part of the recipe {self.name!r} each (its "
                    f"connection or an objective), some of {known}. Received: {name!r}, of "
                    f"{holders} parts, in options={dict(options)}"
                )
        parts = [
            type(part).from_config({k: options.get(k, v) for k, v in config.items()})
            for part, config in zip(parts, configs, strict=True)
        ]
        connection, objectives = self.connection, tuple(parts)
        if connection is not None:
            first, *rest = parts
            connection, objectives = (lambda: first), tuple(rest)
        return dataclasses.replace(self, connection=connection, objectives=lambda: objectives)

    def model(self, causal_lm, **kwargs):
        """The `CCCausalLM` that trains by this recipe.

        Args:
            causal_lm: a KerasHub causal language model.
            **kwargs: of `CCCausalLM`, such as `preprocessor`.

        Returns:
            A `CCCausalLM`, without the recipe's intervention: `finish` sets it.
        """
        connection = None if self.connection is None else self.connection()
        return CCCausalLM(causal_lm, connection, self.objectives(), **kwargs)

    def data(self, model, rows, *, cache=None, **kwargs):
        """The rows to train on.

        Args:
            model: the recipe's model, with a preprocessor; distillation asks it for its answers,
                so call this before training.
            rows: a list of paired row dicts.
            cache: path of the file that keeps the answers of a distillation, or None; other
                recipes have no use for it.
            **kwargs: of `keras_cc.data.augment_with_translation`,
                `keras_cc.data.cross_lingual_rows` or `keras_cc.distill`, whichever the recipe uses.

        Returns:
            A list of rows; `rows` itself where the recipe leaves them as they are.

        Raises:
            TypeError: for `kwargs` that the recipe has no use for.
        """
        if self.augment in AUGMENTATIONS:
            names = pairs.columns_of(model.preprocessor)
            names["pivot_language"] = model.preprocessor.pivot_language
            return AUGMENTATIONS[self.augment](rows, **{**names, **kwargs})
        if self.augment == "distillation":
            return distill(model, rows, cache=cache, **kwargs)
        if kwargs:
            raise TypeError(
                f"The recipe {self.name!r} leaves the rows as they are and takes no options for "
                f"them. Received: {kwargs}"
            )
        return rows

    def finish(self, model, rows, dev_rows=None, *, batch_size=8, verbose="auto"):
        """What is left after training: fit the transform, choose the intervention's options.

        Args:
            model: the recipe's model, trained or not.
            rows: the training rows, whose pairs a transform is fitted on.
            dev_rows: rows to choose an intervention's options by; nothing may be trained on them.
                XTransplant needs them. Without, INCLINE keeps its sigma.
            batch_size: int, rows a batch.
            verbose: 0 for no progress bars.

        Returns:
            A dict of what was found, maybe empty: `fits`, from `CCCausalLM.fit_transform`, and
            `search`, a `keras_cc.SearchResult`.
        """
        found, before = {}, model.intervention
        intervention = None if self.intervention is None else self.intervention()
        if isinstance(intervention, XTransplant) and not dev_rows:
            raise ValueError(
                "`dev_rows` must be given: XTransplant's pair of layers is chosen by them. "
                f"Received: dev_rows={dev_rows!r}"
            )
        options = {"batch_size": batch_size, "verbose": verbose}
        try:
            if intervention is not None:
                model.intervention = intervention
            if self.fits:
                found["fits"] = model.fit_transform(rows, **options)
            grid = self._grid(intervention, model.num_blocks)
            if grid and dev_rows:
                found["search"] = search(model, dev_rows, grid, **options)
        except BaseException:
            model.intervention = before
            raise
        return found

    def _grid(self, intervention, num_blocks):
        if isinstance(intervention, XTransplant):
            layers = _spread(num_blocks, LAYERS_TRIED)
            return {"source_layer": layers, "target_layer": layers}
        return {"sigma": SIGMAS} if isinstance(intervention, Incline) else None


def _spread(count, most):
    """At most `most` of the numbers below `count`, evenly spaced, the first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


_CC = "CC-Tuning, Ye et al., ACL 2025, arXiv 2506.00875"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "sft",
            "nothing: plain supervised fine-tuning, what the others are measured against",
            "the baseline of arXiv 2506.00875",
        ),
        Recipe(
            "translation_sft",
            "data: adds the English rows and translation instructions in both directions",
            "the translation-augmented baseline of arXiv 2506.00875",
            augment="translation",
        ),
        Recipe(
            "cross_lingual_sft",
            "data: adds prompts whose answer is in the other language, in both directions",
            "CrossIn, Lin et al., arXiv 2404.11932",
            augment="cross_lingual",
        ),
        Recipe(
            "distilled_sft",
            "data: the model's own English answers supervise the other languages",
            "SDRRL, Zhang et al., arXiv 2402.12204",
            augment="distillation",
        ),
        Recipe(
            "cc",
            "connection: fused, per layer and dimension",
            _CC,
            connection=FusedConnection,
        ),
        Recipe(
            "cc_equal_weight",
            "connection: fused, half and half, no Decision Maker",
            _CC,
            connection=lambda: FusedConnection(gate=0.5),
        ),
        Recipe(
            "cc_no_transform",
            "connection: fused, nothing stands in for it at inference",
            _CC,
            connection=lambda: FusedConnection(transform=None),
        ),
        Recipe(
            "cc_transform_only",
            "connection: none in the forward pass, a transform learns towards it",
            _CC,
            # The gate that `cc` starts with; it is not trained, as nothing is fused.
            connection=lambda: FusedConnection(gate=0.1, dropout=1.0),
        ),
        Recipe(
            "cc_translation",
            "connection: fused; data: as translation_sft",
            _CC,
            connection=FusedConnection,
            augment="translation",
        ),
        Recipe(
            "cc_published",
            "connection: one English layer selected, added at one position",
            _CC,
            connection=SelectedConnection,
            fits=True,
        ),
        Recipe(
            "own_answers",
            "data: the model's own English answers, made anew while it trains, supervise prompts "
            "that have none",
            "SDRRL, Zhang et al., arXiv 2402.12204, online",
            objectives=lambda: (SelfDistillation("pivot", "labels", refresh=50),),
        ),
        Recipe(
            "own_answers_in_turn",
            "data: as own_answers, for answers that are other words in each language: the model "
            "answers in English first, and then in the prompt's language",
            "SDRRL, Zhang et al., arXiv 2402.12204, online; the two turns are ours",
            objectives=lambda: (SelfDistillation("in_turn", "labels", refresh=50),),
        ),
        Recipe(
            "self_distillation",
            "objective: what the model says after the English prompt, taught to the other path",
            "context distillation, Snell et al., arXiv 2209.15189",
            objectives=lambda: (SelfDistillation("pivot", refresh=50),),
        ),
        Recipe(
            "xtune",
            "objective: the same answer after both prompts, each taught by the other",
            "xTune, Zheng et al., ACL 2021, arXiv 2106.08226",
            objectives=lambda: (Consistency(refresh=50),),
        ),
        Recipe(
            "cc_distilled",
            "connection: fused from the last prompt token on, in the upper blocks, gates open; "
            "objective: the connected pass teaches the monolingual one",
            _CC,
            connection=lambda: FusedConnection(
                "answer", layers="upper", initial_gate=0.99, alignment_loss_weight=0.0
            ),
            objectives=lambda: (SelfDistillation("connected", refresh=50),),
        ),
        Recipe(
            "dft",
            "objective: hidden states drawn to the pivot's at a bottom and a middle layer",
            "DFT, Huo et al., arXiv 2503.01275",
            "LLaMA-2-7B, SFT / DFT: XNLI zh 36.4 / 37.6, XCOPA zh 65.0 / 68.6, XStoryCloze ar "
            "49.7 / 58.8, MMLU zh 30.5 / 32.8",
            objectives=lambda: (DFT(),),
        ),
        Recipe(
            "dft_logit",
            "objective: the same through the logit lens, as cross-entropy",
            "DFT, Huo et al., arXiv 2503.01275",
            "LLaMA-2-7B, SFT / DFT: XNLI zh 36.4 / 36.9, XCOPA zh 65.0 / 66.4, XStoryCloze ar "
            "49.7 / 58.8, MMLU zh 30.5 / 33.2; en-zh translation ruined (COMET 68 to 37)",
            objectives=lambda: (DFT(form="logit"),),
        ),
        Recipe(
            "contrastive",
            "objective: InfoNCE on pooled states of the middle layer, in turn with the task",
            "mid-align, Liu and Niehues, arXiv 2502.14830",
            objectives=lambda: (Contrastive(),),
        ),
        Recipe(
            "afp",
            "objective: InfoNCE on pooled states of the first layer, beside the task",
            "AFP, chongli17/CrossLingualAlignment",
            # Their loss is InfoNCE + 1.5 times the task's; they pool the last token.
            objectives=lambda: (
                Contrastive(0, "last", temperature=0.05, alternating=False, weight=1 / 1.5),
            ),
        ),
        Recipe(
            "treplina",
            "objective: CKA of the prompts' states at a middle layer, anchored to the base model's",
            "TRepLiNa, Nakai et al., arXiv 2510.06249",
            objectives=lambda: (TRepLiNa(),),
        ),
        Recipe(
            "incline",
            "inference: last prompt token moved by one fitted matrix a layer",
            "INCLINE, Wang et al., arXiv 2410.12462",
            "averages, SFT / SFT and INCLINE: XCOPA 66.9 / 69.2, XStoryCloze 87.4 / 88.1, XNLI "
            "69.7 / 71.2, XWinograd 43.8 / 49.8",
            intervention=Incline,
            fits=True,
        ),
        Recipe(
            "xtransplant",
            "inference: an English activation takes the place of the target's own",
            "XTransplant, Ye et al., arXiv 2412.12686",
            intervention=lambda: XTransplant(0, 0),
        ),
    )
}


def get(identifier):
    """A recipe from its name.

    Args:
        identifier: a name in `keras_cc.recipes.names()`, or a `Recipe`.

    Returns:
        A `Recipe`.

    Raises:
        ValueError: for any other name.

    Example:

    ```python
    keras_cc.recipes.get("cc_published").paper
    ```
    """
    if isinstance(identifier, Recipe):
        return identifier
    if isinstance(identifier, str) and identifier in RECIPES:
        return RECIPES[identifier]
    raise ValueError(
        f"`recipe` must be one of {names()} or a `keras_cc.recipes.Recipe`. "
        f"Received: recipe={identifier!r}"
    )


def names():
    """Names of the recipes that `get` knows, plain fine-tuning first.

    Example:

    ```python
    keras_cc.recipes.names()[0]  # "sft"
    ```
    """
    return list(RECIPES)
