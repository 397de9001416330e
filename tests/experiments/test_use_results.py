"""What came of a use, written and read back: every format, whole or not at all, and what a run's page is told of it."""

import io
import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from pyarrow import csv

from pvae.errors import UserError
from pvae.experiments import use_results
from pvae.experiments.use_results import (
    FOLDER,
    KINDS,
    VERBS,
    UseResult,
    check_outputs,
    load_from_run,
    save_in_run,
    write_outputs,
)

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "x": RANDOM.normal(size=(5, 3)).astype("float32"),
    "row": np.arange(5) * 3,
    "flagged": np.array([True, False, True, True, False]),
    "draws": RANDOM.normal(size=(2, 5, 3)),
    "prior": RANDOM.normal(size=(7, 2)),
}
ABOUT = {"variant": "Amortized", "fitted": "abc", "rows": "test rows"}


def figure():
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, 1])
    return made


@pytest.fixture
def use():
    return UseResult("map", dict(ARRAYS), ["Said <so>."], [("Title", ["a"], [["1"]])], figure(), "<html>moved</html>")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Formats


def test_every_format_reads_back_as_what_was_written(use, workplace):
    paths = [workplace / f"deep/out{kind}" for kind in KINDS]
    write_outputs(use, *paths)
    assert files(workplace) == sorted(f"deep/out{kind}" for kind in KINDS)  # and no temporary ones
    with np.load(workplace / "deep/out.npz", allow_pickle=False) as archive:
        assert archive.files == list(ARRAYS)
        for name, values in ARRAYS.items():
            np.testing.assert_array_equal(archive[name], values, strict=True)
    np.testing.assert_array_equal(np.load(workplace / "deep/out.npy", allow_pickle=False), ARRAYS["x"], strict=True)
    assert matplotlib.image.imread(workplace / "deep/out.png").ndim == 3
    assert (workplace / "deep/out.html").read_text() == "<html>moved</html>"


def test_a_table_has_a_column_for_each_number_of_a_row(use, workplace):
    write_outputs(use, workplace / "out.csv")
    table = csv.read_csv(workplace / "out.csv")
    assert table.column_names == ["x0", "x1", "x2", "row", "flagged"]
    columns = [table.column(f"x{k}").to_numpy() for k in range(3)]
    np.testing.assert_array_equal(np.stack(columns, 1).astype("float32"), ARRAYS["x"])  # every digit is kept
    assert table.column("row").to_pylist() == ARRAYS["row"].tolist()
    assert table.column("flagged").to_pylist() == ARRAYS["flagged"].tolist()


def test_what_is_not_about_rows_is_no_column_though_it_is_as_long(use, workplace):
    use.arrays["prior"] = ARRAYS["prior"][:5]
    write_outputs(use, workplace / "one.csv")
    assert "prior0" in csv.read_csv(workplace / "one.csv").column_names
    use.not_columns = {"prior"}
    write_outputs(use, workplace / "other.csv")
    assert csv.read_csv(workplace / "other.csv").column_names == ["x0", "x1", "x2", "row", "flagged"]


@pytest.mark.parametrize(("kind", "what"), [(".png", "picture"), (".html", "page")])
def test_what_there_is_not_can_not_be_written_and_nothing_else_is(kind, what, workplace):
    bare = UseResult("encode", dict(ARRAYS))
    with pytest.raises(UserError, match=f"there is no {what} of encode; write .npz, .npy or .csv"):
        write_outputs(bare, workplace / "out.npz", workplace / f"out{kind}")
    assert files(workplace) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.txt", "unknown format '.txt'"),
        ("out.NPY", "did you mean '.npy'?"),
        ("out", "unknown format ''"),
        ("there.npz", "exists; give overwrite=True to replace it, or another name"),
        ("folder.npz", "is a folder; name a file in it"),
    ],
)
def test_outputs_are_refused_before_any_work(name, words, workplace):
    (workplace / "there.npz").write_text("old")
    (workplace / "folder.npz").mkdir()
    with pytest.raises(UserError, match=rf"^out=.*{name} ?.*") as error:
        check_outputs([workplace / "new.npy", workplace / name], False)
    assert words in str(error.value)
    check_outputs([workplace / "new.npy"], False)
    check_outputs([workplace / "there.npz"], True)
    check_outputs([workplace / "new.html"], False)
    with pytest.raises(UserError, match=r"only map makes a page; write .npz, .npy, .csv or .png"):
        check_outputs([workplace / "new.html"], False, page=False)


# Whole or not at all


@pytest.mark.parametrize("kind", [".npz", ".npy", ".csv", ".png", ".html"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(kind, use, workplace, monkeypatch):
    def broken(file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = workplace / f"out{kind}"
    path.write_text("old")
    if kind == ".html":
        use.page = type("Page", (str,), {"encode": lambda self: broken(io.BytesIO())})("page")
    monkeypatch.setattr(np, "savez_compressed", broken)
    monkeypatch.setattr(np, "save", broken)
    monkeypatch.setattr(use_results, "_write_csv", broken)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: broken(file))
    with pytest.raises(UserError, match=rf"can't write .*out\{kind}: No space left on device"):
        write_outputs(use, path)
    assert path.read_text() == "old"
    assert files(workplace) == [f"out{kind}"]


def test_a_folder_that_is_a_file_is_named(use, workplace):
    (workplace / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write .*file/out.npz"):
        write_outputs(use, workplace / "file/out.npz")


# Kept in a run's folder


def test_a_use_is_kept_and_told_with_its_picture(use, workplace):
    paths = save_in_run(use, workplace, ABOUT)
    assert [path.name for path in paths] == ["map.npz", "map.png", "map.html"]
    assert files(workplace) == [f"{FOLDER}/map{kind}" for kind in (".html", ".json", ".npz", ".png")]
    (told,) = load_from_run(workplace, ["abc"])
    assert {name: told[name] for name in ABOUT} == ABOUT
    assert told["sentences"] == ["Said <so>."]
    assert told["tables"] == [["Title", ["a"], [["1"]]]]
    assert told["arrays"] == paths[0]
    picture = told["picture"].read_bytes()
    assert picture == paths[1].read_bytes()


def test_a_later_use_takes_the_place_of_the_last_of_its_verb(use, workplace):
    save_in_run(use, workplace, ABOUT)
    assert [path.name for path in save_in_run(UseResult("map", {"x": np.zeros(2)}, ["Bare."]), workplace, ABOUT)] == [
        "map.npz"
    ]
    assert files(workplace) == [f"{FOLDER}/map.json", f"{FOLDER}/map.npz"]
    (told,) = load_from_run(workplace, ["abc"])
    assert (told["sentences"], told["picture"]) == (["Bare."], None)


def test_uses_of_earlier_fits_are_left_out_and_the_rest_is_in_the_pages_order(workplace):
    for verb in reversed(VERBS):
        save_in_run(
            UseResult(verb, {"x": np.zeros(2)}), workplace, ABOUT | {"fitted": "old" if verb == "encode" else "abc"}
        )
    assert [told["verb"] for told in load_from_run(workplace, {"abc"})] == [verb for verb in VERBS if verb != "encode"]
    assert [told["verb"] for told in load_from_run(workplace, {"old", "xyz"})] == ["encode"]
    assert load_from_run(workplace, []) == load_from_run(workplace / "nothing", ["abc"]) == []


def test_a_broken_file_says_which_command_writes_it_anew(use, workplace):
    save_in_run(use, workplace, ABOUT)
    (workplace / FOLDER / "map.json").write_text("{")
    with pytest.raises(UserError, match=r"pvae map .* writes it anew"):
        load_from_run(workplace, ["abc"])


def test_numbers_that_json_has_not_become_null(workplace):
    save_in_run(UseResult("encode", {"x": np.zeros(2)}), workplace, ABOUT | {"rate": float("nan")})
    assert json.loads((workplace / FOLDER / "encode.json").read_text())["rate"] is None
