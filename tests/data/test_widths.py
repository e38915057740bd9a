"""The ladder of widths, and how many shapes come of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_cc.data.widths import MAX_SHAPES, Shape, Shapes, fine, ladder, rung, shapes_for, width_of

pytestmark = pytest.mark.once


def test_the_ladder_by_hand():
    assert ladder(100) == (16, 24, 32, 48, 64, 96, 100)
    assert ladder(96) == (16, 24, 32, 48, 64, 96)
    assert ladder(7) == (7,)
    assert ladder(50, [10, 40, 90]) == (10, 40, 50)
    assert ladder(90, [10, 40, 90]) == (10, 40, 90)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_rung_is_the_least_width_that_holds(length, most):
    length = min(length, most)
    widths = ladder(most)
    expected = min(width for width in widths if width >= length)
    assert rung(length, widths) == expected
    # No more than a third is padding, but for the narrowest.
    assert expected <= max(16, length * 3 / 2)
    assert expected == most or expected == width_of(length)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, 1), (10, 1), (79, 1), (80, 2), (140, 3), (10_000, MAX_SHAPES), (None, MAX_SHAPES)],
)
def test_few_steps_are_worth_few_shapes(steps, expected):
    assert shapes_for(steps) == expected
    assert shapes_for(float("inf")) == MAX_SHAPES


shapes_needed = st.lists(
    st.builds(
        Shape,
        st.sampled_from(ladder(512)),
        st.sampled_from(ladder(512)),
        st.sampled_from([4, 8, 16, 32, 64, 128]),
    ),
    max_size=200,
)


@given(shapes_needed)
def test_shapes_hold_what_is_needed_and_are_few(needed):
    shapes = Shapes()
    given_out = [shapes.holding(shape) for shape in needed]
    assert all(own.holds(shape) for own, shape in zip(given_out, needed, strict=True))
    assert set(given_out) == set(shapes.known)
    rungs = 2 * len(ladder(512)) + 6
    assert len(shapes.known) <= MAX_SHAPES + rungs
    # The first ones are as they were asked for.
    first = list(dict.fromkeys(needed))[:MAX_SHAPES]
    assert shapes.known[: len(first)] == first


def test_once_full_the_smallest_that_holds_it_is_used_again():
    shapes = Shapes(most=2)
    small, large = Shape(16, 16, 4), Shape(64, 32, 8)
    assert [shapes.holding(shape) for shape in (small, large)] == [small, large]
    assert shapes.holding(Shape(16, 24, 4)) == large
    # None holds it: one is made that holds all.
    assert shapes.holding(Shape(24, 48, 4)) == Shape(64, 48, 8)
    assert shapes.holding(Shape(16, 16, 4)) == small
    assert shapes.known == [small, large, Shape(64, 48, 8)]


def test_a_plan_takes_the_shapes_that_cost_least():
    """Merging 16 into 24 pads 8 tokens thirty times; 48 into 64, 16 tokens twice."""
    needed = [Shape(16, 16, 4)] * 30 + [Shape(24, 16, 4)] * 20 + [Shape(48, 16, 4)] * 2
    needed += [Shape(64, 16, 4)] * 9
    shapes = Shapes(most=3)
    shapes.plan(needed)
    assert shapes.known == [Shape(16, 16, 4), Shape(24, 16, 4), Shape(64, 16, 4)]
    assert shapes.holding(Shape(48, 16, 4)) == Shape(64, 16, 4)
    # What was not foreseen takes one that is there, if it can.
    assert shapes.holding(Shape(16, 16, 4)) == Shape(16, 16, 4)
    assert shapes.holding(Shape(32, 16, 4)) == Shape(64, 16, 4)
    assert shapes.holding(Shape(16, 24, 4)) == Shape(64, 24, 4)
    shapes.plan([Shape(8, 8, 4)] * 100)  # there are some already
    assert Shape(8, 8, 4) not in shapes.known


@given(shapes_needed.filter(bool), st.integers(1, 6))
def test_a_plan_holds_all_and_is_small(needed, most):
    shapes = Shapes(most)
    shapes.plan(needed)
    known = list(shapes.known)
    assert len(known) <= most
    assert all(shapes.holding(shape).holds(shape) for shape in needed)
    assert shapes.known == known


def test_one_planned_shape_holds_all():
    shapes = Shapes(most=1)
    shapes.plan([Shape(16, 64, 4), Shape(32, 16, 8)])
    assert shapes.known == [Shape(32, 64, 8)]


@pytest.mark.parametrize("most", [1, 3, MAX_SHAPES])
def test_no_more_than_the_rungs_are_added(most):
    shapes = Shapes(most)
    for width in ladder(1024):
        shapes.holding(Shape(width, 16, 4))
    assert len(shapes.known) <= len(ladder(1024))


def test_widths_of_what_is_not_compiled():
    assert [fine(n, 100) for n in (0, 1, 8, 9, 96, 97, 100)] == [8, 8, 8, 16, 96, 100, 100]
    assert fine(3, 5) == 5
    shapes = Shapes(None)
    needed = [Shape(8 * n, 8 + n, 4) for n in range(1, 30)]
    shapes.plan(needed[:20])
    assert [shapes.holding(shape) for shape in needed] == needed
