"""The page of posterior draws compares them with chains by the root law."""

from typing import NamedTuple

import pytest
from benchmarks.posterior_page import chains_seconds, conclusion


class Line(NamedTuple):
    contender: str
    mean: tuple[float, float]
    sd: tuple[float, float]
    seconds: float


def chains(draws: int) -> Line:
    """A line of chains that take 0.3 s and 1 ms for each draw, and whose errors are 1 / sqrt(draws)."""
    return Line(f"HMC, 8 x {draws:,}", (0.0, draws**-0.5), (0.0, draws**-0.5), 0.3 + 1e-3 * draws)


def test_chains_as_accurate_take_what_their_draws_take():
    lines = [chains(100), chains(1000)]
    assert chains_seconds(lines, 0.02, 0.02) == pytest.approx(0.3 + 1e-3 * 2500)
    assert chains_seconds(lines, 0.02, 0.01) == pytest.approx(0.3 + 1e-3 * 10_000)  # the sd rules


GOAL = [(0.9, 0.01, "**met**"), (1.1, 0.01, "**missed**"), (0.1, 0.02, "No")]


@pytest.mark.parametrize(("seconds", "sd", "words"), GOAL)
def test_goal_is_a_tenth_of_the_time_of_chains_as_accurate(seconds, sd, words):
    accuracy = Line("posterior, high", (0.0, 0.0105), (0.0, sd), seconds)
    assert words in conclusion([accuracy, chains(100), chains(1000)])
