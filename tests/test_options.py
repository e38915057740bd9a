"""The checks of options: what is kept of a right value, what is said of a wrong one."""

import numpy as np
import pytest

from keras_cc import options

pytestmark = pytest.mark.once

NAN, INF = float("nan"), float("inf")
ALL_OR_UPPER = r"one of \('all', 'upper'\)"


@pytest.mark.parametrize(
    "check, value, kept",
    [
        (lambda v: options.choice("o", v, ("a", None)), "a", "a"),
        (lambda v: options.choice("o", v, ("a", None)), None, None),
        (lambda v: options.flag("o", v), False, False),
        (lambda v: options.choice_or_share("o", v, ("a",)), 1, 1),
        (lambda v: options.choice_or_share("o", v, ("a",)), "a", "a"),
        (lambda v: options.number("o", v), 3, 3.0),
        (lambda v: options.number("o", v), np.float32(0.5), 0.5),
        (lambda v: options.number("o", v, most=1), 1, 1.0),
        (lambda v: options.number("o", v, positive=True), 1e-9, 1e-9),
        (lambda v: options.count("o", v), np.int64(0), 0),
        (lambda v: options.count("o", v, least=2), 2, 2),
        (lambda v: options.integer("o", v), np.int64(-3), -3),
        (lambda v: options.choice_or_count("o", v, ("a",)), "a", "a"),
        (lambda v: options.choice_or_count("o", v, ("a",)), np.int64(1), 1),
        (lambda v: options.block("o", v), -3, -3),
        (lambda v: options.block_or_share("o", v), 0.25, 0.25),
        (lambda v: options.block_or_share("o", v), np.int64(-1), -1),
        (lambda v: options.blocks("o", v), "all", "all"),
        (lambda v: options.blocks("o", v), range(2, 4), [2, 3]),
    ],
)
def test_right_values(check, value, kept):
    found = check(value)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    "check, wanted, values",
    [
        (lambda v: options.choice("o", v, ("a", None)), r"one of \('a', None\)", ["b", 1, ["a"]]),
        (lambda v: options.flag("o", v), r"one of \(True, False\)", [1, 0, None, "True"]),
        (
            lambda v: options.choice_or_share("o", v, ("a",)),
            r"one of \('a',\) or a number in \[0, 1\]",
            [True, 1.1, -0.1, NAN, "b", None],
        ),
        (lambda v: options.number("o", v), "a number >= 0", [-1, NAN, INF, True, "1", None]),
        (lambda v: options.number("o", v, most=1), "a number >= 0 and <= 1", [1.1, 10**400]),
        (lambda v: options.number("o", v, positive=True), "a number > 0", [0, -1, NAN]),
        (lambda v: options.count("o", v), "an integer >= 0", [-1, 1.0, True, None]),
        (lambda v: options.count("o", v, least=2), "an integer >= 2", [1, 2.0, "2"]),
        (lambda v: options.integer("o", v), "an integer", [1.0, True, None, "1"]),
        (
            lambda v: options.choice_or_count("o", v, ("a",)),
            r"one of \('a',\) or an integer >= 1",
            [0, 1.0, True, None, "b", "1"],
        ),
        (lambda v: options.block("o", v), "an integer, a block number", [0.5, True, "0"]),
        (lambda v: options.block_or_share("o", v), "an integer, a block", [0.0, 1.0, True, "0"]),
        (
            lambda v: options.blocks("o", v),
            r"one of \('all', 'upper'\) or a sequence of block numbers",
            ["", "none"],
        ),
        (
            lambda v: options.blocks("o", v),
            r"one of \('all', 'upper'\) or a non-empty",
            [[], [1.0], [True], 3, None],
        ),
    ],
)
def test_wrong_values(check, wanted, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^`o` must be {wanted}") as error:
            check(value)
        assert str(error.value).endswith(f"Received: o={value!r}")


def test_blocks_of_a_model():
    for share, expected in ((0.5, 15), (0.01, 0), (0.99, 31)):  # of 32, from 0
        assert options.block_number("o", share, 32) == expected
    assert [options.block_number("o", n, 3) for n in (0, 2, -1, -3)] == [0, 2, 2, 0]
    assert options.block_numbers("o", "all", 3) == [0, 1, 2]
    assert options.block_numbers("o", [-1, 0, 2], 3) == [0, 2]
    for value in (3, -4):
        with pytest.raises(ValueError, match=rf"from 0 to 2 .* 3 blocks. Received: o={value}$"):
            options.block_number("o", value, 3)
        with pytest.raises(ValueError, match=rf"hold .* 0 to 2 .*Received: o=\[0, {value}\]$"):
            options.block_numbers("o", [0, value], 3)


class Two(options.Options):
    def __init__(self, one, two="b"):
        self.one, self.two = options.number("one", one), two

    def get_config(self):
        return {"one": self.one, "two": self.two}


def test_an_object_of_options_is_shown_and_made_again_by_them():
    two = Two(1)
    assert repr(two) == "Two(one=1.0, two='b')" == repr(Two.from_config(two.get_config()))
    with pytest.raises(TypeError, match="abstract"):
        options.Options()
