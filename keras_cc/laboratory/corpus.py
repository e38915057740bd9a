"""The text that the laboratory's model is trained on from scratch, and the world that it tells of.

Documents are of five kinds:

    story      what things do to each other, and where; in every language after the same habits
    facts      of a place that the text knows, all that this language has of it
    question   one of those facts, asked and answered
    reading    a made-up fact, and then the question for it: the answer stands before it
    parallel   a sentence, or a question and its answer, and after it the same in another language

Few are parallel, and few are mixed, as in a real corpus: of the other kinds, a share has words of
another language in it, in the patterns of its own. The facts that are told of a place differ
between languages, and English has most. No fact of an item of
`keras_cc.laboratory.laboratory_rows` is in it: their places are in stories alone.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from keras_cc.laboratory import grammar as words
from keras_cc.laboratory.grammar import Language, languages

Place = tuple[str, str]
_NAMED = (*words.ADJECTIVES, *words.NOUNS, *words.VERBS)

KINDS: dict[str, float] = {
    "story": 0.20,
    "facts": 0.15,
    "question": 0.40,
    "reading": 0.15,
    "parallel": 0.10,
}
#: The share of documents in one language that have words of another one in it: half of their words.
MIXED = 0.25
LANGUAGE_SHARES: dict[str, float] = {"en": 0.5, "xa": 0.25, "xb": 0.25}
#: The share of the known facts that a language's text has.
TOLD: dict[str, float] = {"en": 0.9, "xa": 0.6, "xb": 0.6}
#: Places that the text knows; and those of made-up facts, which are others each time.
KNOWN, MADE_UP = 60, 240


@dataclasses.dataclass(frozen=True)
class World:
    """What there is, whatever the language.

    Attributes:
        facts: from a known place to its value of each relation.
        made_up: places that every fact may be told of.
        items: places that no fact is told of: those of the relations.
        told: from language to place to the relations that its text has a value of.
        habits: from a thing to what it does: `(verbs, objects, places)`, those it is mostly met
            with.
    """

    facts: dict[Place, dict[str, str]]
    made_up: list[Place]
    items: list[Place]
    told: dict[str, dict[Place, list[str]]]
    habits: dict[str, tuple[list[str], list[str], list[Place]]]


_VALUES: dict[str, tuple[str, ...]] = {
    "code": words.CODES,
    "thing": words.THINGS,
    "name": words.NAMES,
}


def values(relation: str) -> tuple[str, ...]:
    """The English words that a relation's value is one of."""
    return _VALUES[words.RELATIONS[relation]]


@functools.cache
def world(seed: int = 0) -> World:
    """The world of a seed; see `World`."""
    random = np.random.default_rng([seed, 10])
    every = [(adjective, noun) for adjective in words.ADJECTIVES for noun in words.NOUNS]
    every = [every[n] for n in random.permutation(len(every))]
    facts = {
        place: {relation: _one(random, values(relation)) for relation in words.RELATIONS}
        for place in every[:KNOWN]
    }
    told = {code: _some(random, facts, share) for code, share in TOLD.items()}
    habits = {
        thing: (
            [_one(random, words.VERBS) for _ in range(2)],
            [_one(random, words.THINGS) for _ in range(4)],
            [_any_place(random) for _ in range(4)],
        )
        for thing in words.THINGS
    }
    return World(facts, every[KNOWN : KNOWN + MADE_UP], every[KNOWN + MADE_UP :], told, habits)


def documents(seed: int = 0) -> Iterator[str]:
    """Documents without end, drawn by the seed; see the module.

    Example:

    ```python
    import itertools

    for text in itertools.islice(keras_cc.laboratory.documents(), 3):
        print(text)
    ```
    """
    spoken, found = languages(seed), world(seed)
    random = np.random.default_rng([seed, 11])
    while True:
        kind = _by_share(random, KINDS)
        language = spoken[_by_share(random, LANGUAGE_SHARES)]
        other = spoken[_one(random, [code for code in words.LANGUAGES if code != language.code])]
        if kind != "parallel" and random.random() < MIXED:
            is_told = kind in ("story", "facts")  # an answer is a word of the question's language
            among = (*_NAMED, *words.THINGS) if is_told else _NAMED
            language = _mixed(random, language, other, among)
        yield _WRITE[kind](random, found, language, other)


# ---------------------------------------------------------------- the kinds


def _story(random, world, language, other):
    return " ".join(_event(random, world, language)[0] for _ in range(random.integers(1, 3)))


def _event(random, world, *spoken):
    subject = _one(random, words.THINGS)
    some = world.habits[subject]
    if random.random() < 0.3:  # not as usual
        some = (words.VERBS, words.THINGS, [_any_place(random)])
    verb, thing, place = (_one(random, among) for among in some)
    return [language.event(subject, verb, thing, place) for language in spoken]


def _facts(random, world, language, other):
    told = world.told[language.code]
    place = _one(random, list(told))
    return " ".join(language.fact(r, place, world.facts[place][r]) for r in told[place])


def _question(random, world, language, other):
    told = world.told[language.code]
    place = _one(random, list(told))
    relation = _one(random, told[place])
    return _asked(language, relation, place, world.facts[place][relation])


def _reading(random, world, language, other):
    place, relation, value = _made_up(random, world)
    rest = _made_up(random, world)
    told = [(relation, place, value)]
    if random.random() < 0.5:
        told.insert(int(random.random() * 2), (rest[1], rest[0], rest[2]))
    text = " ".join(language.fact(*fact) for fact in told)
    return f"{text} {_asked(language, relation, place, value)}"


def _parallel(random, world, language, other):
    if random.random() < 0.4:
        return " ".join(_event(random, world, language, other))
    place, relation, value = _made_up(random, world)
    if random.random() < 0.5:
        return " ".join(one.fact(relation, place, value) for one in (language, other))
    return "\n".join(_asked(one, relation, place, value) for one in (language, other))


_WRITE = {
    "story": _story,
    "facts": _facts,
    "question": _question,
    "reading": _reading,
    "parallel": _parallel,
}


def _mixed(random, language: Language, other: Language, among) -> Language:
    """The language with about half of some words of another one."""
    chosen = zip(among, random.random(len(among)) < 0.5, strict=True)
    own = {word: other.words[word] for word, is_other in chosen if is_other}
    return dataclasses.replace(language, words={**language.words, **own})


def _asked(language: Language, relation: str, place: Place, value: str) -> str:
    return f"{language.question(relation, place)}\n{language.word(value)}"


def _made_up(random, world):
    relation = _one(random, tuple(words.RELATIONS))
    return _one(random, world.made_up), relation, _one(random, values(relation))


def _any_place(random):
    return _one(random, words.ADJECTIVES), _one(random, words.NOUNS)


def _some(random, facts, share):
    found = {place: [r for r in of if random.random() < share] for place, of in facts.items()}
    return {place: relations for place, relations in found.items() if relations}


def _one(random, among):
    return among[int(random.random() * len(among))]


def _by_share(random, shares):
    bounds = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(bounds, random.random() * bounds[-1], "right"))]
