"""Tables come back as they were written, and a write leaves the old file or the new one."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pvae.data.readers import read_table
from pvae.errors import UserError
from pvae.runtime.files import atomic_replace, read_json, write_json, write_text

X = np.random.default_rng(0).normal(size=(6, 3))
Y = np.arange(6) % 4


def lines(rows, header="", field="{}"):
    return header + "".join(",".join(field.format(value) for value in row) + "\n" for row in rows.tolist())


def table(x, y=None):
    columns = {f"c{i}": column for i, column in enumerate(x.T)}
    return pa.table(columns if y is None else {"label": y, **columns})


LABELED = np.column_stack([Y, X])
# id: (suffix, writer, has labels)
WRITERS = {
    "npy": (".npy", lambda path: np.save(path, X), False),
    "npz of one array": (".npz", lambda path: np.savez(path, pixels=X), False),
    "npz": (".npz", lambda path: np.savez(path, x=X, y=Y), True),
    "npz compressed": (".npz", lambda path: np.savez_compressed(path, x_train=X, y_train=Y), True),
    "csv": (".csv", lambda path: path.write_text(lines(X)), False),
    "csv with header": (".csv", lambda path: path.write_text(lines(X, "a,b,c\n")), False),
    "csv with labels": (".csv", lambda path: path.write_text(lines(LABELED, "label,a,b,c\n")), True),
    "csv with CRLF": (".csv", lambda path: path.write_text(lines(X), newline="\r\n"), False),
    "csv with BOM": (".csv", lambda path: path.write_text(lines(X), encoding="utf-8-sig"), False),
    "csv with quotes": (".csv", lambda path: path.write_text(lines(X, field='"{}"')), False),
    "parquet": (".parquet", lambda path: parquet.write_table(table(X), path), False),
    "parquet with labels": (".parquet", lambda path: parquet.write_table(table(X, Y), path), True),
}


@pytest.mark.parametrize(("suffix", "write", "labels"), WRITERS.values(), ids=WRITERS)
def test_a_table_comes_back_as_it_was_written(tmp_path, suffix, write, labels):
    path = tmp_path / f"rows{suffix}"
    write(path)
    found = read_table(path)
    names = found.pop("columns", None)
    assert sorted(found) == ["x_train", "y_train"][: 1 + labels]
    assert names is None or len(set(names)) == X.shape[1]
    np.testing.assert_array_equal(found["x_train"], X)
    if labels:
        np.testing.assert_array_equal(found["y_train"], Y)


def test_an_npz_may_have_its_own_test_rows(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, x_train=X, y_train=Y, x_test=X[:2] + 1, y_test=Y[:2], notes=np.zeros(9))
    found = read_table(path)
    assert sorted(found) == ["x_test", "x_train", "y_test", "y_train"]
    np.testing.assert_array_equal(found["x_test"], X[:2] + 1)
    np.testing.assert_array_equal(found["y_test"], Y[:2])


def test_gaps_in_a_csv_are_nan(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",2\n3,\n")
    np.testing.assert_array_equal(read_table(path)["x_train"], [[math.nan, 2], [3, math.nan]])


@pytest.mark.parametrize("old", [None, "old"])
def test_replacing_puts_the_new_file_in_place(tmp_path, old):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)
    with atomic_replace(path) as temporary:
        temporary.write_text("new")
        assert (path.read_text() if path.exists() else None) == old
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def break_off(path, error):
    """Write half of a file."""
    with atomic_replace(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize(
    ("error", "seen", "words"),
    [
        (RuntimeError("stop"), RuntimeError, "stop"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (OSError(28, "No space left on device"), UserError, "file.txt: No space left on device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("old", [None, "old"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error, seen, words, old):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)
    with pytest.raises(seen) as raised:
        break_off(path, error)
    assert words in str(raised.value)
    assert [found.read_text() for found in tmp_path.iterdir()] == ([old] if old else [])


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "text")
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "text"


@pytest.mark.parametrize("below", ["file.txt", "folder/file.txt"])
def test_a_file_in_the_place_of_a_folder_is_an_error_and_stays(tmp_path, below):
    taken = tmp_path / "taken"
    taken.write_text("old")
    with pytest.raises(UserError, match=r"can't write .*taken.*choose another") as error:
        write_text(taken / below, "new")
    assert "\n" not in str(error.value)
    assert taken.read_text() == "old"


def test_a_folder_in_the_place_of_the_file_is_an_error_and_stays(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="can't write"):
        write_text(tmp_path / "taken", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_json_comes_back_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"mean": 1.5, "se": math.nan, "rows": [math.inf, (1, -math.inf)], "name": "é"})
    expected = {"mean": 1.5, "se": None, "rows": [None, [1, None]], "name": "é"}
    assert read_json(path, "results") == json.loads(path.read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is missing"), (b'{"half": ', "can't be read"), (b"\xff\xfe\x00", "can't be read")],
    ids=["missing", "truncated", "binary"],
)
def test_broken_json_is_named_with_what_it_is(tmp_path, content, words):
    path = tmp_path / "state.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, "run pvae fit first")
    message = str(error.value)
    assert str(path) in message
    assert words in message
    assert message.endswith(": run pvae fit first")
    assert "\n" not in message
