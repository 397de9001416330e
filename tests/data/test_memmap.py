"""Memory-mapped rows equal those in memory, in the same batches, at a bounded cost of memory."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae.data import loading, memmap, sources
from pvae.data.loading import load_data
from pvae.data.memmap import AHEAD, MemmapRows
from pvae.errors import UserError
from pvae.runtime.torch_state import available_memory

ROWS, COLUMNS = 60, 6
CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
UNIT = RNG.random((ROWS, COLUMNS))
UNIT[:, 0] = 0.5 + 1e-9  # above one half, but not as float32
BYTES = RNG.integers(0, 256, (ROWS, COLUMNS), dtype=np.uint8)

# id: (values, binarization)
CASES = {
    "float32": (UNIT.astype(np.float32), "none"),
    "big-endian float64": (UNIT.astype(">f8"), "none"),
    "bytes": (BYTES, "none"),
    "bytes as levels": (BYTES, "levels"),
    "truth values": (BYTES > 99, "threshold"),
    "threshold": (UNIT, "threshold"),
    "dynamic": (UNIT, "dynamic"),
    "pictures": (UNIT.reshape(ROWS, 2, 3), "none"),
}


@pytest.fixture
def save(tmp_path):
    """A function from an array to the path of its .npy file."""

    def write(values, name="rows.npy"):
        np.save(tmp_path / name, values)
        return str(tmp_path / name)

    return write


@pytest.fixture
def streamed(save):
    """Bytes on disk, 40 of 60 rows to train on."""
    return load_data(save(BYTES), test_size=20, stream=True)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(memmap, "CHUNK_VALUES", 4 * COLUMNS)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pvae-rows")]


@pytest.mark.parametrize(("values", "binarize"), CASES.values(), ids=CASES)
def test_memory_mapped_data_equal_data_in_memory(save, small_pieces, values, binarize):
    options = {"binarize": binarize, "test_size": 9, "validation_size": 0.2, "seed": 3}
    resident, streamed = (load_data(save(values), **options, stream=stream) for stream in (False, True))
    assert isinstance(resident.train, Tensor)
    assert isinstance(streamed.train, MemmapRows)
    assert streamed.train[:].equal(resident.train)
    assert streamed.train[5:17].equal(resident.train[5:17])
    assert streamed.train.shape == tuple(resident.train.shape)
    for part in ("validation", "test"):
        assert getattr(streamed, part).equal(getattr(resident, part))
    assert streamed.fixed_train(10).x.equal(resident.fixed_train(10).x)
    assert streamed.sample.equal(resident.sample)
    assert (streamed.identity, streamed.shape) == (resident.identity, tuple(resident.shape))
    assert streamed.digest == resident.digest
    assert streamed.summary() == resident.summary() + ", read from disk as it goes"


@pytest.mark.parametrize("start", [0, 2, 9])
@pytest.mark.parametrize(("values", "binarize"), CASES.values(), ids=CASES)
def test_batches_and_the_random_stream_equal_those_in_memory(save, values, binarize, start):
    found = []
    for stream in (False, True):
        data = load_data(save(values), binarize=binarize, test_size=9, stream=stream)
        torch.manual_seed(0)
        found.append((list(data.batches(7, seed=1, epoch=4, start=start)), torch.get_rng_state()))
    (resident, here), (streamed, there) = found
    assert len(resident) == len(streamed) == max(0, 8 - start)
    assert all(a.x.equal(b.x) and a.index.equal(b.index) for a, b in zip(resident, streamed, strict=True))
    assert here.equal(there)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_reach_the_gpu(streamed):
    moved = streamed.to(torch.device("cuda"))
    for here, there in zip(streamed.batches(7, seed=0, epoch=0), moved.batches(7, seed=0, epoch=0), strict=True):
        assert there.x.is_cuda
        assert there.index.is_cuda
        assert there.x.cpu().equal(here.x)
        assert there.index.cpu().equal(here.index)
    assert moved.digest == streamed.digest


@pytest.mark.parametrize("stream", [False, True])
def test_chunks_are_all_rows_once(save, small_pieces, stream):
    data = load_data(save(BYTES), test_size=20, stream=stream)
    pieces = list(data.iter_chunks("train"))
    index = torch.cat([index for _, index in pieces])
    assert index.sort().values.tolist() == list(range(40))
    assert torch.cat([x for x, _ in pieces]).equal(data.train[index])
    assert max(len(x) for x, _ in pieces) == 4


def test_chunks_on_disk_come_in_the_order_of_the_file(save, small_pieces):
    data = load_data(save(np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)), stream=True)
    x = torch.cat([x for x, _ in data.iter_chunks("train")])[:, 0]
    assert x.equal(x.sort().values)


def test_the_digest_changes_with_any_value_and_with_the_split(save):
    other = BYTES.copy()
    other[17, 3] ^= 1
    found = {load_data(save(values), seed=seed, stream=True).digest for values in (BYTES, other) for seed in (0, 1)}
    assert len(found) == 4


def test_a_pass_for_the_digest_is_made_once_for_all_devices(streamed, monkeypatch):
    first = streamed.digest
    monkeypatch.setattr(MemmapRows, "iter_chunks", lambda self: pytest.fail("read again"))
    assert streamed.to(CPU).digest == streamed.digest == first


def test_reading_is_ahead_by_a_bounded_number(streamed, monkeypatch):
    done, fetch = [], MemmapRows._fetch
    monkeypatch.setattr(MemmapRows, "_fetch", lambda self, index: (done.append(len(index)), fetch(self, index))[1])
    batches = streamed.batches(1, seed=0, epoch=0)
    for taken in (1, 2, 3):
        next(batches)
        deadline = time.monotonic() + 10
        while len(done) < taken + AHEAD and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(done) == taken + AHEAD


def test_an_epoch_left_early_leaves_no_thread(streamed):
    batches = streamed.batches(3, seed=0, epoch=0)
    next(batches)
    assert readers()
    batches.close()
    assert not readers()
    with suppress(ZeroDivisionError):
        for _ in streamed.batches(3, seed=0, epoch=0):
            raise ZeroDivisionError
    assert not readers()
    list(streamed.batches(3, seed=0, epoch=0))
    assert not readers()


def changed(path):
    np.save(path, BYTES[::-1])


def touched(path):
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("change", "words"), [(changed, "has changed"), (touched, "has changed"), (os.remove, "No such file")]
)
def test_a_file_that_changes_during_training_is_refused(save, change, words):
    path = save(BYTES)
    data = load_data(path, stream=True)
    batches = data.batches(1, seed=0, epoch=0)
    next(batches)
    change(path)
    with pytest.raises(UserError, match=words) as error:
        list(batches)
    assert str(error.value).startswith(path)
    assert not readers()


def test_rows_are_memory_mapped_from_half_of_the_available_memory_on(save, monkeypatch):
    path = save(BYTES)
    for left, kind in ((8 * ROWS * COLUMNS, Tensor), (8 * ROWS * COLUMNS - 1, MemmapRows)):
        monkeypatch.setattr(loading, "available_memory", lambda left=left: left)
        assert isinstance(load_data(path).train, kind)


def test_available_memory_is_less_than_the_physical_one():
    assert 2**26 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_test_rows_by_default_are_a_fifth_up_to_a_limit(save, monkeypatch):
    path = save(BYTES)
    assert len(load_data(path, stream=True).test) == 12
    monkeypatch.setattr(sources, "HELD_OUT", 5 * COLUMNS)
    assert [len(load_data(path, stream=stream).test) for stream in (False, True)] == [5, 5]
    assert len(load_data(path, stream=True, test_size=0.2).test) == 12


def with_nan(row):
    values = UNIT.copy()
    values[row, 2] = np.nan
    return values


@pytest.mark.parametrize("row", [0, 5, ROWS - 1])
def test_a_value_that_is_no_number_is_named_with_its_row(save, small_pieces, row):
    with pytest.raises(UserError, match=rf"rows.npy: row {row}, column 2 is nan; .*\(1 in rows "):
        load_data(save(with_nan(row)), stream=True)


# id: (values, options of load, words)
BAD = {
    "one dimension": (BYTES[0], {}, "shape (6,), but at least 2 rows"),
    "words": (BYTES.astype(str), {}, "numbers are needed"),
    "objects": (np.array([[{}], [None]]), {}, "pickled Python objects, which are never loaded"),
    "by column": (np.asfortranarray(UNIT), {}, "column by column"),
    "levels of fractions": (UNIT, {"binarize": "levels"}, "takes whole numbers"),
    "bytes to binarize": (BYTES, {"binarize": "dynamic"}, "values from 0 to 1"),
    "labels": (BYTES, {"with_labels": True}, "takes labels"),
    "no test": (BYTES, {"test_size": 0}, "no test rows"),
}


@pytest.mark.parametrize(("values", "options", "words"), BAD.values(), ids=BAD)
def test_files_that_can_not_be_memory_mapped_are_refused_in_one_line(save, values, options, words):
    path = save(values)
    with pytest.raises(UserError) as error:
        load_data(path, **options, stream=True)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(save):
    path = save(BYTES)
    os.truncate(path, os.path.getsize(path) - 9)
    with pytest.raises(UserError, match=r"not a readable \.npy file"):
        load_data(path, stream=True)


def test_other_formats_are_not_memory_mapped(tmp_path):
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n5,6\n")
    for name in ("digits", str(tmp_path / "rows.csv")):
        with pytest.raises(UserError, match=r"only a \.npy file"):
            load_data(name, stream=True)


def test_held_out_rows_that_do_not_fit_are_refused(save, monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda: 4 * 40 * COLUMNS)
    path = save(BYTES)
    assert len(load_data(path, test_size=20).test) == 20
    with pytest.raises(UserError, match=r"21 test and validation rows take .* test_size and validation_size"):
        load_data(path, test_size=20, validation_size=1)


MEMORY = """
import sys
from pathlib import Path
import torch
from pvae.data.loading import load_data

def anonymous():
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
before, most = anonymous(), 0
data = load_data(sys.argv[1], test_size=1000, stream=True)
for number, (x, index) in enumerate(data.batches(256, 0, 0)):
    if number % 50 == 0:
        most = max(most, anonymous())
data.fixed_train(1000)
print(len(data.train), max(most, anonymous()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rows", [25_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_an_epoch_takes_no_memory_for_rows_on_disk(tmp_path, rows):
    # 100 and 400 MB of bytes, which as float32 would take 400 and 1600 MB.
    np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint8, shape=(rows, 4000))
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "big.npy")]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    trained, megabytes = map(int, done.stdout.split())
    assert trained == rows - 1000
    assert megabytes < 100
