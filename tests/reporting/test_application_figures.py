"""Pictures of uses: one scale of greys, what is missing, what is left out and said to be."""

import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pvae.reporting.application_figures import ACROSS, IMAGES, PANELS, STRETCHES, draw_scores, draw_sheets, draw_strips
from pvae.reporting.style import MISSING, image_grid, image_shape

NAN = np.nan
rng = np.random.default_rng(0)


def images(count, columns=12):
    return rng.uniform(size=(count, columns))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def limits(figure):
    return {axis.images[0].get_clim() for axis in figure.axes}


@pytest.mark.parametrize(("stretch", "wanted"), [(1.0, (0.0, 1.0)), (5.0, None)])
def test_all_lines_have_the_scale_of_the_first(stretch, wanted):
    rows = stretch * images(20)
    figure = draw_strips({"original": rows, "far": 3 * rows - 1}, (3, 4))
    assert limits(figure) == {wanted or (rows[:ACROSS].min(), rows[:ACROSS].max())}


def test_missing_entries_are_pale_blue_and_what_lies_between_images_stays_white():
    axis = Figure(figsize=(7, 3), dpi=100).subplots()
    rows = np.full((2, 9), NAN)
    rows[1] = 1
    image_grid(axis, rows, (3, 3), 2)
    axis.set_position((0, 0, 1, 1))
    canvas = FigureCanvasAgg(axis.figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[150, [150, 350, 550], :3] / 255
    np.testing.assert_allclose(drawn, [to_rgb(MISSING), (1, 1, 1), (0, 0, 0)], atol=1 / 128)


@pytest.mark.parametrize("shape", [(3, 4), (12,)], ids=["images", "curves"])
def test_a_line_without_values_is_left_out(shape):
    rows = images(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_strips({"original": rows, "decoded": rows, "PCA": np.full_like(rows, NAN)}, shape)
        image_grid(Figure().subplots(), np.full((3, 12), NAN), shape, 3)
    names = [axis.get_ylabel() for axis in figure.axes] if image_shape(shape)[0] > 1 else legend(figure)
    assert names == ["original", "decoded"]


def test_what_fills_gaps_is_marked_where_they_are():
    rows = images(3)
    seen = rows.copy()
    seen[1, [2, 7]] = NAN
    figure = draw_strips({"original": rows, "seen": seen, "mean": rows + 0.1, "a draw": rows + 0.2}, (12,))
    for place, gaps in enumerate(([], [2, 7], [])):
        own, points, *fills = figure.axes[place].lines
        assert (own.get_marker(), points.get_marker(), points.get_linestyle()) == ("o", "o", "None")
        assert [line.get_markevery() for line in fills] == [gaps, gaps]
    assert "diamonds: missing entries" in figure.get_supxlabel()
    assert "diamonds" not in draw_strips({"original": rows}, (12,)).get_supxlabel()


@pytest.mark.parametrize(("shape", "most"), [((3, 4), ACROSS), ((12,), PANELS)], ids=["images", "curves"])
def test_rows_that_are_not_drawn_are_counted(shape, most):
    said = draw_strips({"a": images(29)}, shape).get_suptitle()
    assert said == f"the first {most} of 29 rows"
    assert draw_strips({"a": images(most)}, shape).get_suptitle() == ""


@pytest.mark.parametrize("shape", [(3, 4), (12,)], ids=["images", "curves"])
def test_stretches_and_rows_that_are_not_drawn_are_counted(shape):
    figure = draw_sheets({f"{n}": images(300 if n == 1 else 3) for n in range(29)}, shape)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert figure.get_suptitle() == f"the first {STRETCHES} of 29 stretches"
    assert titles[:3] == ["0", f"1: {IMAGES} of 300, evenly spaced", "2"]
    assert draw_sheets({"a": images(5)}, shape).get_suptitle() == ""


def test_a_path_of_curves_goes_from_its_first_row_to_its_last():
    path = images(300)
    figure = draw_sheets({"rows 0 to 1": path}, (12,), per_line=300)
    lines = figure.axes[0].lines
    np.testing.assert_array_equal([lines[0].get_ydata(), lines[-1].get_ydata()], path[[0, -1]])
    assert not np.array_equal(lines[0].get_color(), lines[-1].get_color())
    assert legend(figure) == ["first row", "last row"]
    plain = draw_sheets({"draws": images(40)}, (12,))
    assert len({line.get_color() for line in plain.axes[0].lines}) == 1
    assert plain.legends == []


@pytest.mark.parametrize(("rows", "lines", "across"), [(1, 1, 9), (9, 1, 9), (16, 1, 16), (41, 3, 14)])
def test_few_images_stay_small_and_many_are_broken_into_lines(rows, lines, across):
    drawn = draw_sheets({"a": images(rows)}, (3, 4), per_line=rows).axes[0].images[0].get_array()
    assert drawn.shape == (4 * lines - 1, 5 * across - 1)


def test_histograms_are_shares_of_rows():
    own, reference = rng.normal(size=(2, 50))
    figure = draw_scores(dict.fromkeys("abcd", (own, reference, 1.0)), None)
    assert [axis.get_ylabel() for axis in figure.axes if axis.axison] == ["share of rows", "", "", "share of rows"]
    heights = figure.axes[0].patches[0].get_xy()[:, 1]  # an outline: each bar's height stands at both of its ends
    assert heights.max() <= 1
    assert np.isclose(np.unique(heights).min(), 0)
    assert np.allclose(heights * 50, (heights * 50).round())
