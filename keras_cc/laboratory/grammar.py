"""Languages that say the same things in other words and another order: a relexified grammar.

English has its words. `xa` and `xb` have words drawn from syllables by the seed, but for a share of
the adjectives, nouns and verbs, which is common to all, as are names and codes. A sentence is a
glossed pattern a language: the gloss says which word, the pattern in which order.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from keras_cc.options import count

#: English is the pivot; the others are drawn.
LANGUAGES: tuple[str, ...] = ("en", "xa", "xb")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    old new red blue green grey white black tall low wide narrow quiet loud cold warm dry wet
    dark bright sunny windy broken empty lonely hidden sunken golden silver wooden stony sandy
    mossy dusty foggy frozen crooked sleepy ancient secret
    """
)
NOUNS = _words(
    """
    mill bridge harbour tower market garden castle village river lake island forest meadow
    valley hill cave chapel school station palace inn farm orchard quarry well gate wall
    square cliff beach marsh canal temple library theatre prison lighthouse vineyard stable
    bakery
    """
)
THINGS = _words(
    """
    heron fox owl bear wolf horse goat sheep swan goose crow eagle falcon sparrow robin raven
    lion tiger otter beaver badger hare rabbit mouse rat cat dog deer boar salmon trout pike
    eel crab snail bee wasp ant spider moth beetle frog toad snake lizard turtle whale seal
    lamp lantern candle key lock anchor oar sail rope ladder hammer saw axe spade rake plough
    wheel cart boat barrel basket bucket bottle cup bowl plate spoon knife fork needle thread
    button coat cloak hat glove boot belt ring crown sword shield bow arrow spear drum flute
    harp bell horn book letter map pen coin purse mirror comb oak elm ash birch willow pine
    fir rose lily tulip daisy clover thistle fern ivy apple pear plum cherry grape fig nut
    """
)
VERBS = _words(
    """
    watches finds likes hides follows carries fears guards touches wants hears knows
    """
)
#: What a fact of a place is of: its word, and the kind of its value.
RELATIONS: dict[str, str] = {"code": "code", "emblem": "thing", "owner": "name"}
CODES: tuple[str, ...] = tuple(f"{letter}{digit}" for letter in "kqvz" for digit in range(8))
NAMES = _words(
    """
    anna boris clara david elena felix greta henry irene jonas karen lukas maria nina oscar
    paula quinn rosa simon tessa ursula victor wanda xavier yara zoe
    """
)
#: The share of adjectives, nouns and verbs that is common to all languages.
SHARED = 0.25
_FUNCTION_WORDS = ("the", "of", "is", "what", "near")

_PATTERNS: dict[str, dict[str, str]] = {
    "en": {
        "place": "{adjective} {noun}",
        "fact": "the {relation} of the {place} is {value} .",
        "question": "what is the {relation} of the {place} ?",
        "event": "the {subject} {verb} the {object} near the {place} .",
    },
    "xa": {  # the verb last, the noun before its adjective, a question word in its answer's place
        "place": "{noun} {adjective}",
        "fact": "{place} of {relation} {value} is .",
        "question": "{place} of {relation} what is ?",
        "event": "{place} near {subject} {object} {verb} .",
    },
    "xb": {  # the verb first, an article behind its noun
        "place": "{noun} the {adjective}",
        "fact": "is {value} {relation} {place} of .",
        "question": "is what {relation} {place} of ?",
        "event": "{verb} {subject} {object} near {place} .",
    },
}
_SYLLABLES = {
    "xa": [consonant + vowel for consonant in "bdgklmnr" for vowel in "aeiou"],
    "xb": [consonant + vowel for consonant in "fhpstvwz" for vowel in ("a", "o", "ai", "u", "y")],
}


@dataclasses.dataclass(frozen=True)
class Language:
    """One of the laboratory's languages: a word for each English word, and patterns.

    Attributes:
        code: `"en"`, `"xa"` or `"xb"`.
        words: from English words to this language's. Names and codes are not in it: they are the
            same in every language.
    """

    code: str
    words: Mapping[str, str]

    def place(self, place: tuple[str, str]) -> str:
        """An adjective and a noun, in this language."""
        return self._say("place", adjective=place[0], noun=place[1])

    def fact(self, relation: str, place: tuple[str, str], value: str) -> str:
        """That the relation's value of the place is this one."""
        return self._say("fact", relation=relation, place=place, value=value)

    def question(self, relation: str, place: tuple[str, str]) -> str:
        """What the relation's value of the place is."""
        return self._say("question", relation=relation, place=place)

    def event(self, subject: str, verb: str, object: str, place: tuple[str, str]) -> str:
        """That a thing does something to another one near a place."""
        return self._say("event", subject=subject, verb=verb, object=object, place=place)

    def word(self, english: str) -> str:
        """The word for an English one, or the name or code itself."""
        return self.words.get(english, english)

    def _say(self, pattern, **parts):
        said = []
        for gloss in _PATTERNS[self.code][pattern].split():
            if gloss == "{place}":
                said.append(self.place(parts["place"]))
            elif gloss.startswith("{"):
                said.append(self.word(parts[gloss[1:-1]]))
            else:
                said.append(self.word(gloss))
        return " ".join(said).replace(" .", ".").replace(" ?", "?")


@functools.cache
def languages(seed: int = 0) -> dict[str, Language]:
    """The laboratory's languages, by their codes.

    Args:
        seed: int, at least 0: another one draws other words, and shares others.

    Raises:
        ValueError: for a `seed` that is no integer of at least 0.

    Example:

    ```python
    spoken = keras_cc.laboratory.languages()
    spoken["en"].question("code", ("old", "mill"))  # "what is the code of the old mill?"
    spoken["xa"].question("code", ("old", "mill"))
    ```
    """
    random = np.random.default_rng([count("seed", seed), 0])
    shared: set[str] = set()
    for kind in (ADJECTIVES, NOUNS, VERBS):
        shared |= set(random.choice(kind, round(SHARED * len(kind)), replace=False).tolist())
    words = (*_FUNCTION_WORDS, *RELATIONS, *ADJECTIVES, *NOUNS, *VERBS, *THINGS)
    taken = {*words, *NAMES, *CODES}
    found = {"en": Language("en", {word: word for word in words})}
    for place, code in enumerate(LANGUAGES[1:], 1):
        random = np.random.default_rng([seed, place])
        own = {}
        for word in words:
            own[word] = word if word in shared else _new_word(code, random, taken)
            taken.add(own[word])
        found[code] = Language(code, own)
    return found


def shared_words(seed: int = 0) -> frozenset[str]:
    """The words of the lexicon that all languages have in common, beside names and codes."""
    spoken = languages(seed)
    return frozenset(
        word
        for word in spoken["en"].words
        if all(spoken[code].words[word] == word for code in LANGUAGES)
    )


def vocabulary(seed: int = 0) -> list[str]:
    """Every word of the laboratory, each once, in a fixed order."""
    spoken = [word for language in languages(seed).values() for word in language.words.values()]
    return list(dict.fromkeys([*CODES, *NAMES, *spoken]))


def _new_word(code, random, taken):
    while True:
        length = int(random.integers(2, 4))
        word = "".join(random.choice(_SYLLABLES[code], length).tolist())
        if word not in taken:
            return word
