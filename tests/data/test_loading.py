"""Splits, batches and binarization of data sets, and one line for everything that can be wrong with them."""

import io
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from pvae.data.loading import load_data
from pvae.errors import UserError

ROWS, COLUMNS = 24, 5
# Values from 0 to 1, no two alike, that tell their row: row = (COLUMNS * ROWS - 1) * first value / COLUMNS.
X = np.linspace(0, 1, ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
Y = np.arange(ROWS)

IMAGES = np.arange(11 * 4 * 4, dtype=np.uint8).reshape(11, 4, 4)
MNIST = {
    "train-images-idx3-ubyte": IMAGES[:7],
    "train-labels-idx1-ubyte": np.arange(7, dtype=np.uint8),
    "t10k-images-idx3-ubyte": IMAGES[7:],
    "t10k-labels-idx1-ubyte": np.arange(4, dtype=np.uint8),
}


def rows_of(x):
    """Which rows of X these are."""
    return (x[:, 0] * (ROWS * COLUMNS - 1) / COLUMNS).round().long()


def dump(save):
    """The bytes that a writer makes."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def put(name, content=None):
    """A maker of one file: bytes or text as they are, an array as .npy, a dictionary of arrays as .npz."""

    def make(folder):
        path = folder / name
        match content:
            case str():
                path.write_text(content)
            case bytes():
                path.write_bytes(content)
            case dict():
                np.savez(path, **content)
            case np.ndarray():
                np.save(path, content)
        return str(path)

    return make


def name(word):
    """A maker of nothing: a name that is not a file's."""
    return lambda folder: word


def idx(array):
    """MNIST's file format: two zero bytes, the type, the number of dimensions, the dimensions, the values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist(**changed):
    """A maker of MNIST's files in torchvision's layout, with the content of some changed, or left out if None."""
    files = {file: idx(array) for file, array in MNIST.items()}
    files |= {file: changed[key] for key in changed for file in files if file.replace("-", "_").startswith(key)}

    def make(folder):
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for file, content in files.items():
            if content is not None:
                (raw / file).write_bytes(content)
        return "mnist"

    return make


@pytest.fixture
def read(tmp_path):
    """Load what a maker makes."""
    return lambda make, **options: load_data(make(tmp_path), data_folder=tmp_path, **options)


@pytest.fixture
def path(tmp_path):
    """X and its labels as a file."""
    return put("rows.npz", {"x": X, "y": Y})(tmp_path)


@pytest.fixture
def own_test(tmp_path):
    """A file whose training rows X stay in their order, since it has its own test rows."""
    return put("own.npz", {"x_train": X, "y_train": Y, "x_test": X[::-2], "y_test": Y[::-2]})(tmp_path)


def stream():
    """State of the process's random stream."""
    return torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({}, (19, 0, 5)),
        ({"test_size": 6}, (18, 0, 6)),
        ({"test_size": 6, "validation_size": 3}, (15, 3, 6)),
        ({"test_size": 0.25, "validation_size": 0.5}, (9, 9, 6)),
        ({"test_size": 1, "validation_size": 22}, (1, 22, 1)),
    ],
    ids=str,
)
def test_splits_are_disjoint_and_cover_all_rows(path, sizes, counts):
    data = load_data(path, **sizes)
    parts = (data.train, data.validation, data.test)
    assert tuple(map(len, parts)) == counts
    whole = torch.cat(parts)
    assert whole[rows_of(whole).argsort()].equal(torch.from_numpy(X))
    assert whole.dtype == torch.float32


def test_splits_depend_on_the_seed_alone(path):
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(digests))
        before = stream()
        digests.append(load_data(path, test_size=6, validation_size=3, seed=seed).digest)
        assert stream() == before
    assert digests[0] == digests[1] != digests[2]


def test_labels_in_words_are_numbered_in_alphabetical_order(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("0,label\n" + "".join(f"{row},{'dog' if row % 2 else 'cat'}\n" for row in range(20)))
    data = load_data(str(file))
    assert torch.equal(data.train_labels, (data.train[:, 0] % 2).long())
    assert torch.equal(data.test_labels, (data.test[:, 0] % 2).long())


def test_label_names_stay_when_only_some_labels_are_selected(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("0,label\n" + "".join(f"{row},{['dog', 'eel', 'cat'][row % 3]}\n" for row in range(30)))
    data = load_data(str(file), only=[1, 2])
    assert data.label_names == ("cat", "dog", "eel")
    assert data.labels.tolist() == [1, 2]
    assert load_data("digits").label_names is None


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_label_of_one_split_alone_is_a_label_of_all(tmp_path, part):
    arrays = {f"x_{side}": X for side in ("train", "test")} | {f"y_{side}": 1 + Y % 2 for side in ("train", "test")}
    row = rows_of(getattr(load_data(put("all.npz", arrays)(tmp_path), validation_size=0.25), part))[0]
    arrays["y_test" if part == "test" else "y_train"][row] = 0
    data = load_data(put("rare.npz", arrays)(tmp_path), validation_size=0.25, with_labels=True)
    assert data.labels.tolist() == [0, 1, 2]
    for rows, own in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert rows[:, COLUMNS:].argmax(1).equal(own)  # a label's column is its place among all kinds
    assert load_data(put("bare.npy", X)(tmp_path)).labels is None


def test_labels_follow_their_rows(path):
    data = load_data(path, test_size=6, validation_size=3)
    assert data.train_labels.equal(rows_of(data.train))
    assert data.test_labels.equal(rows_of(data.test))


def test_own_test_rows_stay_as_they_are(own_test):
    data = load_data(own_test)
    assert data.train.equal(torch.from_numpy(X))
    assert data.test.equal(torch.from_numpy(X[::-2].copy()))
    assert data.train_labels.tolist() == Y.tolist()
    assert data.test_labels.tolist() == Y[::-2].tolist()
    held = load_data(own_test, validation_size=4)
    assert (len(held.train), len(held.validation)) == (20, 4)
    assert held.test.equal(data.test)
    assert held.train_labels.equal(rows_of(held.train))


def test_rows_without_labels_have_none(read):
    data = read(put("rows.npy", X))
    assert data.train_labels is data.test_labels is None


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_an_epoch_visits_every_row_once(own_test, batch_size):
    data = load_data(own_test)
    batches = list(data.batches(batch_size, seed=0, epoch=0))
    assert sorted(torch.cat([index for _, index in batches]).tolist()) == list(range(ROWS))
    assert all(x.equal(data.train[index]) for x, index in batches)
    assert [len(x) for x, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_order_depends_on_seed_and_epoch_alone(own_test):
    data = load_data(own_test)
    orders = []
    for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]:
        torch.manual_seed(len(orders))
        before = stream()
        orders.append(tuple(torch.cat([index for _, index in data.batches(5, seed, epoch)]).tolist()))
        assert stream() == before
    assert orders[0] == orders[1]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 9])
def test_start_skips_whole_batches(own_test, start):
    data = load_data(own_test)
    whole = [index.tolist() for _, index in data.batches(5, seed=3, epoch=2)]
    assert len(whole) == 5
    assert [index.tolist() for _, index in data.batches(5, seed=3, epoch=2, start=start)] == whole[start:]


def test_threshold_is_above_one_half(read):
    values = np.array([[0, 0.5], [0.5000001, 1], [0.25, 0.75], [0.4999999, 0.9]])
    data = read(put("rows.npz", {"x_train": values, "x_test": values[::-1]}), binarize="threshold")
    assert data.train.tolist() == [[0, 0], [1, 1], [0, 1], [0, 1]]
    assert data.test.tolist() == data.train.flip(0).tolist()
    (batch,) = data.batches(4, seed=0, epoch=0)
    assert batch.x.equal(data.train[batch.index])


def test_dynamic_draws_differ_and_their_mean_is_the_intensity(own_test):
    # SE = sqrt(p (1 - p) / R) over R epochs, 0 where p is 0 or 1; for each entry and for the mean of all
    data, R = load_data(own_test, binarize="dynamic"), 2000
    torch.manual_seed(0)
    drawn = torch.empty(R, ROWS, COLUMNS)
    for epoch in range(R):
        for x, index in data.batches(10, seed=0, epoch=epoch):
            drawn[epoch, index] = x
    assert data.train.equal(torch.from_numpy(X))
    assert set(drawn.unique().tolist()) == {0, 1}
    assert not drawn[0].equal(drawn[1])
    error, se = drawn.mean(0) - data.train, (data.train * (1 - data.train) / R).sqrt()
    assert (error.abs() <= 5 * se + 1e-6).all()
    assert error.sum().abs() <= 5 * se.norm()


def test_dynamic_held_out_rows_are_drawn_once(own_test):
    loads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(loads))
        before = stream()
        loads.append(load_data(own_test, binarize="dynamic", validation_size=5, seed=seed))
        assert stream() == before
    assert all(data.test.equal(loads[0].test) for data in loads)
    assert loads[0].validation.equal(loads[1].validation)
    assert set(torch.cat([loads[0].test, loads[0].validation]).unique().tolist()) == {0, 1}


def test_dynamic_held_out_rows_have_the_intensity_as_mean(read):
    rows = np.full((1000, 20), 0.3)  # SE = sqrt(0.3 * 0.7 / 20000)
    data = read(put("rows.npz", {"x_train": rows, "x_test": rows}), binarize="dynamic")
    for x in (data.test, data.fixed_train(1000).x):
        assert x.mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 20000))


@pytest.mark.parametrize("binarize", ["none", "threshold", "dynamic"])
def test_evaluation_sees_the_same_training_rows_each_time(own_test, binarize):
    data = load_data(own_test, binarize=binarize)
    before = stream()
    first, again = data.fixed_train(10), data.fixed_train(10)
    assert stream() == before
    assert first.x.equal(again.x)
    assert first.index.tolist() == list(range(10))
    if binarize == "dynamic":
        assert set(first.x.unique().tolist()) == {0, 1}
    else:
        assert first.x.equal(data.train[:10])


def test_rows_at_positions_are_read_and_drawn_alone(tmp_path):
    file, which = put("rows.npy", X)(tmp_path), torch.tensor([7, 0, 7])
    plain = [load_data(file, stream=on).fixed_train(which) for on in (False, True)]
    drawn = [load_data(file, stream=on, binarize="dynamic").fixed_train(which) for on in (False, True)]
    assert plain[0].x.equal(plain[1].x)
    assert plain[0].x.equal(load_data(file).train[which])
    assert plain[0].index.equal(which)
    assert drawn[0].x.equal(drawn[1].x)
    assert set(drawn[0].x.unique().tolist()) <= {0.0, 1.0}


def test_identity_and_digest_change_with_the_binarization(own_test):
    found = [load_data(own_test, binarize=binarize) for binarize in ("none", "threshold", "dynamic", "none")]
    assert [data.identity for data in found] == ["own-none", "own-threshold", "own-dynamic", "own-none"]
    assert len({data.digest for data in found}) == 3
    assert found[0].digest == found[3].digest
    assert all(len(data.digest) == 16 for data in found)


@pytest.mark.parametrize("part", ["x_train", "x_test"])
def test_digest_changes_with_any_value(read, part):
    rows = {"x_train": X, "x_test": X[:4]}
    other = rows | {part: rows[part] + np.eye(len(rows[part]), COLUMNS, dtype=np.float32)}
    assert read(put("rows.npz", rows)).digest != read(put("rows.npz", other)).digest


@pytest.mark.parametrize(
    ("binarize", "how"),
    [("none", "from 0 to 1, taken as they are"), ("threshold", "0 or 1, binarized at 0.5"), ("dynamic", "afresh")],
)
def test_summary_is_one_line_of_sizes_and_binarization(own_test, binarize, how):
    line = load_data(own_test, binarize=binarize).summary()
    assert line.startswith(f"own-{binarize}: 24 training + 12 test rows of 5 values, ")
    assert how in line
    assert "\n" not in line
    assert "20 training + 4 validation + 12 test rows" in load_data(own_test, validation_size=4).summary()


def test_shape_is_that_of_one_datapoint_and_rows_are_flat(read):
    data = read(put("rows.npy", X.reshape(ROWS // 2, 2, COLUMNS)), test_size=2)
    assert data.shape == (2, COLUMNS)
    assert data.train.shape == (10, 10)
    assert "2 x 5 values" in data.summary()


def test_digits_are_at_hand():
    data = load_data("digits")
    assert (data.train.shape, data.test.shape, data.shape) == ((1438, 64), (359, 64), (8, 8))
    assert (data.train.min(), data.train.max()) == (0, 1)
    assert sorted(data.train_labels.unique().tolist()) == list(range(10))


@pytest.mark.parametrize("by", ["folder", "environment"])
def test_mnist_is_read_from_torchvisions_files(tmp_path, monkeypatch, by):
    mnist()(tmp_path)
    monkeypatch.setenv("PVAE_DATA", str(tmp_path if by == "environment" else tmp_path / "elsewhere"))
    data = load_data("mnist", data_folder=tmp_path if by == "folder" else None)
    assert (data.name, data.shape) == ("mnist", (4, 4))
    assert (data.train * 255).round().byte().equal(torch.from_numpy(IMAGES[:7]).flatten(1))
    assert (data.test * 255).round().byte().equal(torch.from_numpy(IMAGES[7:]).flatten(1))
    assert data.train_labels.tolist() == list(range(7))
    assert data.test_labels.tolist() == list(range(4))


REAL = os.environ.get("PVAE_DATA")


@pytest.mark.skipif(
    not (REAL and (Path(REAL) / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()), reason="no MNIST in PVAE_DATA"
)
def test_real_mnist_has_its_rows():
    data = load_data("mnist", binarize="dynamic", validation_size=10_000)
    assert (data.train.shape, data.validation.shape, data.test.shape) == ((50_000, 784), (10_000, 784), (10_000, 784))
    assert data.shape == (28, 28)
    assert (data.train.min(), data.train.max()) == (0, 1)
    assert data.train_labels.bincount().min() > 4000


def changed(value, at=(3, 1)):
    """X with another value at row 3, column 1."""
    x = X.astype(np.float64)
    x[at] = value
    return x


NPY = dump(lambda file: np.save(file, X))
NPZ = dump(lambda file: np.savez(file, x=X))
PARQUET = dump(lambda file: parquet.write_table(pa.table({"a": X[:, 0], "b": X[:, 1]}), file))
OUTSIDE = {"x_train": changed(1.5), "x_test": X}

# id: (maker, options of load, words of the message)
BAD = {
    "unknown name": (name("mnits"), {}, ["unknown data 'mnits'", "did you mean 'mnist'?", "digits", ".parquet"]),
    "name of two lines": (name("two\nlines"), {}, ["unknown data 'two lines'"]),
    "unknown name far from all": (name("qqqq"), {}, ["unknown data 'qqqq'", "digits", "kmnist"]),
    "missing": (put("rows.npy"), {}, ["rows.npy", "no such file"]),
    "unknown suffix": (put("rows.npyy", NPY), {}, ["rows.npyy", "unknown format '.npyy'", "did you mean '.npy'?"]),
    "folder": (lambda folder: str(folder) + "/", {}, ["unknown format ''", ".csv"]),
    "empty npy": (put("rows.npy", b""), {}, ["rows.npy", "the file is empty"]),
    "empty csv": (put("rows.csv", b""), {}, ["rows.csv", "the file is empty"]),
    "words among numbers in the first line": (
        put("rows.csv", "1,NA\n3,4\n5,6\n"),
        {},
        ["rows.csv", "first line", "'NA'"],
    ),
    "two columns of one name": (put("rows.csv", "a,a\n1,2\n3,4\n5,6\n"), {}, ["rows.csv", "two columns"]),
    "a row without label": (put("rows.csv", "a,label\n1,0\n2,\n3,1\n"), {}, ["rows.csv", "no label"]),
    "blank csv": (put("rows.csv", "\n\n"), {}, ["rows.csv", "not a readable .csv file"]),
    "truncated npy": (put("rows.npy", NPY[:-9]), {}, ["rows.npy", "not a readable .npy file"]),
    "npy cut in its header": (put("rows.npy", NPY[:20]), {}, ["rows.npy", "not a readable .npy file"]),
    "truncated npz": (put("rows.npz", NPZ[:-30]), {}, ["rows.npz", "not a readable .npz file"]),
    "truncated parquet": (put("rows.parquet", PARQUET[:-9]), {}, ["rows.parquet", "not a readable .parquet file"]),
    "text as npy": (put("rows.npy", "1,2\n3,4\n"), {}, ["rows.npy", "not a readable .npy file"]),
    "text as npz": (put("rows.npz", "1,2\n3,4\n"), {}, ["rows.npz", "not a readable .npz file"]),
    "npy as npz": (put("rows.npz", NPY), {}, ["rows.npz", "a single .npy array"]),
    "npz as npy": (put("rows.npy", NPZ), {}, ["rows.npy", "holds an .npz archive"]),
    "npy as csv": (put("rows.csv", NPY), {}, ["rows.csv", "not a readable .csv file"]),
    "npy as parquet": (put("rows.parquet", NPY), {}, ["rows.parquet", "not a readable .parquet file"]),
    "pickled npy": (put("rows.npy", np.array([{}, None])), {}, ["rows.npy", "pickled", "never loaded"]),
    "pickled npz": (put("rows.npz", {"x": np.array([{}, None])}), {}, ["rows.npz", "pickled", "never loaded"]),
    "npz without x": (put("rows.npz", {"a": X, "b": X}), {}, ["arrays a, b", "none named x or x_train"]),
    "npz short of labels": (put("rows.npz", {"x": X, "y": Y[:3]}), {}, ["24 rows but 3 labels in the train part"]),
    "words in an npy": (put("rows.npy", X.astype(str)), {}, ["of type <U", "numbers are needed"]),
    "complex npy": (put("rows.npy", X.astype(complex)), {}, ["of type complex128", "numbers are needed"]),
    "header-only csv": (put("rows.csv", "a,b\n"), {}, ["rows.csv", "no rows of numbers"]),
    "label-only csv": (put("rows.csv", "label\n1\n2\n"), {}, ["rows.csv", "no rows of numbers"]),
    "csv row too short": (put("rows.csv", "a,b\n1,2\n3\n4,5\n"), {}, ["rows.csv", "Expected 2 columns, got 1"]),
    "csv row too long": (put("rows.csv", "a,b\n1,2\n3,4,5\n"), {}, ["rows.csv", "Expected 2 columns, got 3"]),
    "csv with words": (put("rows.csv", "a,b\n1,x\n2,y\n"), {}, ["rows.csv", "column 'b' is not numeric"]),
    "csv by semicolons": (put("rows.csv", "a;b\n1;2\n3;4\n"), {}, ["rows.csv", "column 'a;b' is not numeric"]),
    "csv in Latin-1": (put("rows.csv", b"\xe9,b\n1,2\n"), {}, ["rows.csv", "not a readable .csv file"]),
    "csv with a gap": (put("rows.csv", "a,b\n1,2\n3,\n"), {}, ["rows.csv", "row 1, column 1 is nan"]),
    "NaN": (put("rows.npy", changed(np.nan)), {}, ["rows.npy", "row 3, column 1 is nan", "1 in all"]),
    "infinity": (put("rows.npy", changed(-np.inf)), {}, ["rows.npy", "row 3, column 1 is -inf"]),
    "too large for float32": (put("rows.npy", changed(1e39)), {}, ["rows.npy", "row 3, column 1 is 1e+39"]),
    "NaN in a picture": (put("rows.npy", changed(np.nan).reshape(12, 2, 5)), {}, ["row 1, column 1, 1 is nan"]),
    "NaN in test rows": (put("rows.npz", {"x_train": X, "x_test": changed(np.nan)}), {}, ["row 3, column 1 is nan"]),
    "test rows of other width": (put("rows.npz", {"x_train": X, "x_test": X[:, :3]}), {}, ["rows.npz", "5", "3"]),
    "one row": (put("rows.npy", X[:1]), {}, ["rows.npy", "shape (1, 5)", "at least 2 rows"]),
    "no columns": (put("rows.npy", X[:, :0]), {}, ["rows.npy", "shape (24, 0)", "at least 1 value"]),
    "one dimension": (put("rows.npy", X[0]), {}, ["rows.npy", "shape (5,)", "at least 2 rows"]),
    "one number": (put("rows.npy", np.array(0.5)), {}, ["rows.npy", "shape ()"]),
    "test as large as the data": (put("rows.npy", X), {"test_size": 24}, ["test_size=24", "out of 24 rows", "23"]),
    "test larger than the data": (put("rows.npy", X), {"test_size": 99}, ["test_size=99", "out of 24 rows"]),
    "negative test": (put("rows.npy", X), {"test_size": -1}, ["test_size=-1", "a count"]),
    "negative fraction": (put("rows.npy", X), {"test_size": -0.2}, ["test_size=-0.2", "a fraction"]),
    "fractional count": (put("rows.npy", X), {"test_size": 1.5}, ["test_size=1.5", "count", "fraction"]),
    "test of NaN": (put("rows.npy", X), {"test_size": math.nan}, ["test_size=nan"]),
    "endless test": (put("rows.npy", X), {"test_size": math.inf}, ["test_size=inf"]),
    "no test": (put("rows.npy", X), {"test_size": 0}, ["test_size=0", "no test rows"]),
    "fraction of no row": (put("rows.npy", X), {"test_size": 0.01}, ["test_size=0.01", "no test rows"]),
    "validation takes all": (put("rows.npy", X), {"validation_size": 19}, ["validation_size=19", "out of 19 rows"]),
    "negative validation": (put("rows.npy", X), {"validation_size": -3}, ["validation_size=-3"]),
    "fractional validation": (put("rows.npy", X), {"validation_size": 2.5}, ["validation_size=2.5"]),
    "threshold above 1": (put("rows.npz", OUTSIDE), {"binarize": "threshold"}, ["row 3, column 1 is 1.5", "threshold"]),
    "dynamic above 1": (
        put("rows.npz", OUTSIDE),
        {"binarize": "dynamic"},
        ["row 3, column 1 is 1.5", "set binarize=none"],
    ),
    "dynamic below 0": (
        put("rows.npz", {"x_train": X, "x_test": changed(-0.25)}),
        {"binarize": "dynamic"},
        ["(test rows): row 3, column 1 is -0.25", "0 to 1"],
    ),
    "unknown binarization": (
        put("rows.npy", X),
        {"binarize": "treshold"},
        ["unknown binarization 'treshold'", "did you mean 'threshold'?"],
    ),
    "test size of own test": (put("rows.npz", OUTSIDE), {"test_size": 5}, ["own test set of 24 rows", "test_size"]),
    "test size of mnist": (mnist(), {"test_size": 2}, ["mnist comes with its own test set of 4 rows", "test_size"]),
    "truncated images": (
        mnist(train_images=idx(IMAGES[:7])[:-5]),
        {},
        ["mnist", "another data_folder"],
    ),
    "truncated labels": (
        mnist(t10k_labels=idx(Y.astype("u1"))[:-5]),
        {},
        ["mnist", "another data_folder"],
    ),
    "images as labels": (mnist(train_labels=idx(IMAGES[:7])), {}, ["mnist", "can't be read", "1 dimension"]),
    "empty images": (mnist(train_images=b""), {}, ["mnist", "another data_folder"]),
    "text as images": (
        mnist(train_images=b"<html>not found</html>"),
        {},
        ["mnist", "another data_folder"],
    ),
    "images left out": (mnist(t10k_images=None), {}, ["mnist", "another data_folder"]),
    "more images than labels": (mnist(train_labels=idx(np.zeros(5, "u1"))), {}, ["7 train images but 5 labels"]),
    "fewer images than labels": (mnist(t10k_labels=idx(np.zeros(9, "u1"))), {}, ["4 test images but 9 labels"]),
}


@pytest.mark.parametrize(("make", "options", "words"), BAD.values(), ids=BAD)
def test_bad_data_are_refused_in_one_line(read, make, options, words):
    with pytest.raises(UserError) as error:
        read(make, **options)
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
