"""Runs opened for use, and rows out of their data or of files: the same values whatever holds them."""

import atexit
import contextlib
import functools
import io
import math
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from pvae import applications, noise
from pvae.cli.app import main
from pvae.data.loading import load_data
from pvae.diagnostics.evaluation import Budget, evaluate
from pvae.errors import UserError
from pvae.experiments import row_selection
from pvae.experiments.row_selection import parse_positions, select_rows
from pvae.experiments.run import open_run

SMALL = "--epochs 1 --hidden 16 --latent 2"
FIT = f"fit {SMALL}"
COMPARE = f"compare {SMALL} --guides Amortized,SemiAmortized --rows 5 --samples 5 --refine-steps 5"
COUNTS = np.random.default_rng(0).poisson(3.0, (60, 6)).astype("float32")
DIGITS = load_digits()
IMAGES = (DIGITS.images[:12] / 16).astype("float32")


@functools.cache
def place():
    """A folder of this process's runs, removed at its end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    np.save(folder / "counts.npy", COUNTS)
    return folder


@functools.cache
def run_of(line):
    """The folder of a command's run, made once; {place} in the line is where files are."""
    folder = Path(tempfile.mkdtemp(dir=place())) / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*shlex.split(line.format(place=place())), "--out", str(folder)]) == 0, err.getvalue()
    return folder


@pytest.fixture(scope="module")
def run():
    return open_run(run_of(FIT))


@pytest.fixture(scope="module")
def counts():
    return open_run(run_of(f"fit {SMALL} --data {{place}}/counts.npy --likelihood Poisson"))


@pytest.fixture(scope="module")
def labelled():
    program = Path(__file__).parents[2] / "models" / "conditional.py"
    return open_run(run_of(f"fit {SMALL} --trust --program {program}:ConditionalVAE"), trust=True)


# Runs


def test_a_fit_opens_with_its_program_guide_and_data(run):
    assert (run.name, list(run.others), run.columns) == ("Amortized", [], 64)
    assert run.guide.sites.dim == 2
    assert not run.guide.training
    assert len(run.data.test) == 359
    assert open_run(run_of(FIT), "Amortized").name == "Amortized"


def test_a_comparison_opens_at_its_first_variant_or_at_one_by_name():
    folder = run_of(COMPARE)
    first, second = open_run(folder), open_run(folder, "SemiAmortized")
    assert (first.name, list(first.others)) == ("Amortized", ["SemiAmortized"])
    assert (second.name, list(second.others)) == ("SemiAmortized", ["Amortized"])
    assert type(second.guide).__name__ == "SemiAmortized"
    pairs = zip(first.guide.encoder.parameters(), second.guide.encoder.parameters(), strict=True)
    assert any(not a.equal(b) for a, b in pairs)


def test_variants_that_are_not_trained_yet_are_none(tmp_path):
    shutil.copytree(run_of(COMPARE), tmp_path / "run")
    (tmp_path / "run/Amortized/checkpoint.safetensors").unlink()
    assert (open_run(tmp_path / "run").name, open_run(tmp_path / "run").others) == ("SemiAmortized", [])
    with pytest.raises(UserError, match="has no variant 'Amortized'; did you mean 'SemiAmortized'"):
        open_run(tmp_path / "run", "Amortized")
    (tmp_path / "run/SemiAmortized/checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="holds no trained variant; the command that began it with resume=True goes on"):
        open_run(tmp_path / "run")


def test_what_is_no_run_or_has_other_data_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no recipe.toml; pvae fit --out .* makes one"):
        open_run(tmp_path)
    np.save(tmp_path / "own.npy", COUNTS)
    folder = run_of(f"fit {SMALL} --data {tmp_path}/own.npy --likelihood Poisson")
    np.save(tmp_path / "own.npy", COUNTS + 1)
    with pytest.raises(UserError, match=r"was fitted to other rows than .* has now; fit it anew"):
        open_run(folder)


def test_code_that_a_run_names_runs_only_where_it_is_trusted(labelled):
    with pytest.raises(UserError, match="trust"):
        open_run(labelled.folder)


def test_a_run_has_the_applications_as_methods(run):
    """They take the run's test rows unless others are given, and give what the functions give."""
    few, test = run.data.test[:4], run.data.test
    assert run.encode(K=2).mean.equal(applications.encode(run.model, run.guide, test, K=2).mean)
    assert run.reconstruct(few).equal(applications.reconstruct(run.model, run.guide, few))
    assert run.decode(run.encode(few).mean).shape == (4, 64)
    assert run.sample(5).equal(applications.sample(run.model, test[:5]))
    assert run.interpolate(steps=2).x.shape == (3, 64)
    assert run.augment(few, per_row=2).x.shape == (8, 64)
    assert run.map_latents(few, size=3).grid.shape == (3, 3, 64)
    hidden = few.clone()
    hidden[:, ::2] = torch.nan
    assert run.impute(hidden, K=5, steps=2).x[:, 1::2].equal(few[:, 1::2])
    assert run.denoise(few, noise.FlipNoise(rate=0.1), K=5, steps=2).x.shape == (4, 64)
    assert len(run.detect_anomalies(few, K=2).scores["evidence"]) == 4
    assert run.encode("train", K=1).mean.shape == (len(run.data.train), 2)


def test_a_run_evaluates_and_diagnoses_with_its_seed(run):
    x, budget = run.data.test[:6], Budget(K=5, steps=2)
    expected = evaluate(run.model, run.guide, x, budget=budget, seed=run.recipe.seed)
    assert run.evaluate(x, budget=budget).values["elbo"].equal(expected.values["elbo"])
    assert "Amortized" in repr(run)
    assert f"{len(run.data.train)} rows of digits-threshold" in repr(run)


# A run's own rows


def test_words_stand_for_parts_of_the_data(run):
    test, train = select_rows(run), select_rows(run, "train")
    assert test.x.equal(run.data.test)
    assert test.labels.equal(run.data.test_labels)
    assert test.index is None
    assert train.x.equal(run.data.train)
    assert train.index.equal(torch.arange(len(run.data.train)))
    assert (test.where, train.where) == ("test rows", "training rows")
    assert test.from_run
    with pytest.raises(UserError, match="the run has no validation rows; name others, or a file"):
        select_rows(run, "validation")


def test_a_selection_takes_labels_index_and_places_along(run):
    whole, part = select_rows(run, "train"), select_rows(run, "train", "5,0:2")
    which = [5, 0, 1]
    assert part.x.equal(whole.x[which])
    assert part.labels.equal(whole.labels[which])
    assert part.index.tolist() == part.place.tolist() == which


@pytest.mark.parametrize(
    ("select", "found"),
    [
        ("0:3", [0, 1, 2]),
        (":2", [0, 1]),
        ("8:", [8, 9]),
        (":", list(range(10))),
        ("3,1,3", [3, 1, 3]),
        ("9,0:1", [9, 0]),
        (" 4 , 5 ", [4, 5]),
        ("5:2,7", [7]),
    ],
)
def test_positions_are_those_that_are_named(select, found):
    assert parse_positions(select, 10, "rows") == found


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ("10", "select=10: there is no row 10; there are 10 rows, counted from 0"),
        ("0:11", "select=0:11: there is no row 10; there are 10 rows"),
        ("0:1000000000000", "there is no row 10; there are 10 rows"),
        ("-1", "there is no row -1"),
        ("-3:2", "there is no row -3"),
        ("1,-2", "there is no row -2"),
        ("5:5", "select=5:5 is empty; there are 10 rows, counted from 0"),
        ("7:3", "is empty"),
        ("", "select '': write positions, as 3,17,5 or 0:20"),
        ("1,", "write positions"),
        ("one", "write positions"),
        ("1.5", "write positions"),
        ("0:9:2", "write positions"),
    ],
)
def test_positions_that_are_none_are_refused(select, words):
    with pytest.raises(UserError) as error:
        parse_positions(select, 10, "rows")
    assert words in str(error.value)


@pytest.mark.parametrize("source", ["tset", "tests", "nothing", ""])
def test_an_unknown_word_is_no_file(run, source):
    with pytest.raises(UserError, match=f"there are no rows '{source}'.*known: test, train, validation"):
        select_rows(run, source)


class Unread:
    """Rows on disk of which no more than some may be read."""

    def __init__(self, rows, most):
        self.rows, self.most, self.shape = rows, most, rows.shape

    def __getitem__(self, places):
        assert len(places) <= self.most, f"{len(places)} rows are read"
        return self.rows[places]


def test_of_rows_on_disk_those_selected_alone_are_read(counts, monkeypatch):
    np.save(place() / "many.npy", np.tile(COUNTS, (50, 1)))
    streamed = load_data(str(place() / "many.npy"), stream=True)
    own, read = replace(counts, data=streamed), streamed.train.values
    streamed.train.values = Unread(read, 3)
    found = select_rows(own, "train", "5,0:2")
    assert found.index.tolist() == found.place.tolist() == [5, 0, 1]
    assert found.x.equal(torch.from_numpy(read[streamed.train.rows[[5, 0, 1]]]))
    streamed.train.values = read
    assert select_rows(own, "train").x.equal(streamed.train.to_tensor())
    monkeypatch.setattr(row_selection, "available_memory", lambda: 2000 * 6 * 4.0)
    with pytest.raises(UserError, match=r"2400 training rows take .*; name fewer, as select=0:1000"):
        select_rows(own, "train")
    assert len(select_rows(own, "train", "0:1000").x) == 1000


# Files


def written(folder, name, x, labels=None):
    """The path of a file of rows, in the format of its ending."""
    path, flat = folder / name, x.reshape(len(x), math.prod(x.shape[1:]))
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, x=x, **({} if labels is None else {"y": labels}))
    else:
        table = pd.DataFrame(flat, columns=[f"c{k}" for k in range(flat.shape[1])])
        table = table if labels is None else table.assign(label=labels)
        table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("shape", [(12, 64), (12, 8, 8)], ids=["flat", "images"])
def test_a_file_holds_the_same_rows_in_every_format(run, name, shape, tmp_path):
    found = select_rows(run, written(tmp_path, name, IMAGES.reshape(shape)))
    assert found.x.equal(torch.from_numpy(IMAGES.reshape(12, 64) > 0.5).float())  # binarized as the run's rows were
    assert (found.index, found.where, found.place.tolist()) == (None, f"rows of {name}", list(range(12)))
    assert found.labels is None
    assert not found.from_run
    part = select_rows(run, written(tmp_path, name, IMAGES.reshape(shape)), "3,1")
    assert part.x.equal(found.x[[3, 1]])


@pytest.mark.parametrize("name", ["rows.npz", "rows.csv", "rows.parquet"])
def test_a_file_brings_its_labels(run, name, tmp_path):
    found = select_rows(run, written(tmp_path, name, IMAGES, DIGITS.target[:12]))
    assert found.labels.tolist() == DIGITS.target[:12].tolist()


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "bool"])
def test_numbers_of_any_type_are_rows(run, dtype, tmp_path):
    found = select_rows(run, written(tmp_path, "rows.npy", (IMAGES > 0.5).astype(dtype)))
    assert found.x.dtype == torch.float32
    assert found.x.equal(torch.from_numpy(IMAGES.reshape(12, 64) > 0.5).float())


def test_one_row_may_stand_alone(run, tmp_path):
    assert select_rows(run, written(tmp_path, "one.npy", IMAGES[0].reshape(64))).x.shape == (1, 64)
    assert select_rows(run, written(tmp_path, "one.npy", IMAGES[:1])).x.shape == (1, 64)


def at(x, row, column, value):
    x = x.astype("float32").copy()
    x.reshape(len(x), -1)[row, column] = value
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (IMAGES[:, :, :7], "rows have 56 columns, but the run's have 64 (8 x 8)"),
        (np.zeros((3, 65)), "rows have 65 columns"),
        (at(IMAGES, 2, 5, np.nan), "row 2, column 5 is nan"),
        (at(IMAGES, 2, 5, np.inf), "row 2, column 5 is inf"),
        (at(IMAGES, 3, 0, 1.5), "row 3, column 0 is 1.5"),
        (at(IMAGES, 0, 63, -0.1), "row 0, column 63 is -0.1"),
        (IMAGES.astype("complex64"), "the values are of type complex64, but numbers are needed"),
        (IMAGES[:0], "rows.npy: there are no rows in it"),
    ],
)
def test_rows_that_do_not_fit_the_run_are_refused_with_their_place(run, x, words, tmp_path):
    with pytest.raises(UserError) as error:
        select_rows(run, written(tmp_path, "rows.npy", x))
    assert words in str(error.value)


def test_files_that_are_none_are_refused(run, tmp_path):
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY broken")
    (tmp_path / "text.csv").write_text("a,b\nx,y\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, words in (
        ("broken.npy", "not a readable .npy file"),
        ("text.csv", "is not numeric"),
        ("empty.npz", "the file is empty"),
        ("absent.csv", "no such file"),
        ("rows.txt", "unknown format '.txt'"),
    ):
        with pytest.raises(UserError, match=words):
            select_rows(run, str(tmp_path / name))


def test_values_outside_the_likelihoods_support_are_refused_but_not_where_they_may_be_noisy(counts, tmp_path):
    path = written(tmp_path, "counts.npy", at(COUNTS[:4], 1, 2, 0.5))
    with pytest.raises(UserError) as error:
        select_rows(counts, path)
    assert "row 1, column 2 is 0.5, outside the support of the run's likelihood Poisson" in str(error.value)
    assert select_rows(counts, path, raw=True).x[1, 2] == 0.5
    assert select_rows(counts, written(tmp_path, "fine.npy", COUNTS[:4])).x.equal(torch.from_numpy(COUNTS[:4]))


def test_missing_entries_pass_only_where_they_are_expected(run, counts, tmp_path):
    path = written(tmp_path, "gaps.npy", at(IMAGES, 2, 5, np.nan))
    found = select_rows(run, path, missing=True)
    assert found.x.isnan().nonzero().tolist() == [[2, 5]]
    assert found.x[2, :5].equal(torch.from_numpy(IMAGES[2].flat[:5] > 0.5).float())
    with pytest.raises(UserError, match="row 1, column 2 is nan"):
        select_rows(counts, written(tmp_path, "raw.npy", at(COUNTS[:4], 1, 2, np.nan)), raw=True)


def test_words_for_labels_are_numbered_as_the_runs_are(tmp_path):
    names = np.array(["bird", "ant", "cat"])[DIGITS.target[:90] % 3]
    rows = (DIGITS.images[:90] / 16).reshape(90, 64)
    path = written(tmp_path, "named.csv", rows, names)
    run = open_run(run_of(f"fit {SMALL} --data {path} --binarize threshold"))
    found = select_rows(run, path)
    assert found.labels.tolist() == [["ant", "bird", "cat"].index(name) for name in names]
    few = select_rows(run, written(tmp_path, "few.csv", rows[:4], ["cat", "bird", "bird", "cat"]))
    assert few.labels.tolist() == [2, 1, 1, 2]
    with pytest.raises(UserError, match=r"the run's data have no label 'dog'.*known: ant, bird, cat"):
        select_rows(run, written(tmp_path, "other.csv", rows[:2], ["ant", "dog"]))


def test_words_are_no_labels_of_a_run_of_numbers(run, tmp_path):
    with pytest.raises(UserError, match="its labels are words, but the run's are not; give numbers, or none"):
        select_rows(run, written(tmp_path, "named.csv", IMAGES, ["ant"] * 12))


def test_columns_of_labels_are_those_of_all_parts_of_the_data(tmp_path):
    program = Path(__file__).parents[2] / "models" / "conditional.py"
    x, y = (DIGITS.images[:80] > 8).reshape(80, 64).astype("float32"), DIGITS.target[:80] % 3
    rare = {"x_train": x[:60][y[:60] > 0], "y_train": y[:60][y[:60] > 0], "x_test": x[60:], "y_test": y[60:]}
    np.savez(tmp_path / "rare.npz", **rare)
    run = open_run(
        run_of(f"fit {SMALL} --trust --program {program}:ConditionalVAE --data {tmp_path}/rare.npz"), trust=True
    )
    found = select_rows(run, written(tmp_path, "rows.npz", x[60:], y[60:]))
    assert found.x[:, 64:].equal(run.data.test[:, 64:])
    assert found.x[:, 64:].argmax(1).tolist() == y[60:].tolist()


def test_labels_become_columns_where_the_program_takes_them(labelled, tmp_path):
    found = select_rows(labelled, written(tmp_path, "rows.csv", IMAGES, DIGITS.target[:12]))
    assert labelled.columns == 64
    assert found.x.shape == (12, 74)
    assert found.x[:, 64:].argmax(1).tolist() == DIGITS.target[:12].tolist()
    assert select_rows(labelled).x.shape[1] == 74
    with pytest.raises(UserError, match="the run's program takes labels, and the file has none; add a column 'label'"):
        select_rows(labelled, written(tmp_path, "bare.npy", IMAGES))
    with pytest.raises(UserError, match="it has a label that the run's data do not have; known are"):
        select_rows(labelled, written(tmp_path, "strange.csv", IMAGES, [11] * 12))


def test_the_module_lists_the_words_that_it_knows():
    assert tuple(row_selection.SPLIT_LABELS) == ("test", "train", "validation")


def test_columns_are_known_by_their_names(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 3)).round(3)

    def table(name, order, more=()):
        path = tmp_path / name
        lines = [",".join([*(("a", "b", "c")[c] for c in order), *more])]
        lines += [",".join([*(f"{row[c]}" for c in order), *("9" for _ in more)]) for row in rows]
        path.write_text("\n".join(lines))
        return path

    data = load_data(str(table("rows.csv", (0, 1, 2))))
    run = replace(open_run(run_of(FIT)), data=data)
    assert data.columns == ("a", "b", "c")
    for path in (table("turned.csv", (2, 0, 1)), table("wider.csv", (0, 1, 2), more=("sd_a", "row"))):
        np.testing.assert_array_equal(
            row_selection._from_file(run, path, True, False).x.numpy(), rows.astype(np.float32)
        )
    with pytest.raises(UserError, match="it has no column 'b', which the run's data have"):
        row_selection._from_file(run, table("lacking.csv", (0, 2)), True, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, :-1], r"rows have shape \(63,\), but the run's have 64 columns"),
        (
            lambda x: x.where(x == x, x).index_fill(1, torch.tensor([3]), math.nan),
            "column 3 is nan; Run.impute fills in",
        ),
        (
            lambda x: x.index_fill(1, torch.tensor([3]), 0.5),
            "column 3 is 0.5, outside the support of the run's likelihood",
        ),
    ],
    ids=["width", "missing", "support"],
)
def test_tables_that_do_not_fit_the_run_are_refused_by_its_methods(run, change, words):
    x = change(run.data.test[:4].clone())
    for method in (run.encode, run.reconstruct, run.evaluate, run.diagnose, run.detect_anomalies):
        with pytest.raises(UserError, match=words):
            method(x)


def test_a_number_of_samples_is_at_least_one(run):
    with pytest.raises(UserError, match="n is 0, but it must be at least 1"):
        run.sample(0)


def test_a_data_set_says_in_a_line_what_it_is(run):
    assert repr(run.data).startswith("Dataset digits")
    assert len(repr(run.data).splitlines()) == 1
