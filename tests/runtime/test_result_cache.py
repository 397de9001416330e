"""Result cache: parts are loaded as they were saved, and computed anew exactly when their key has changed."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pvae.runtime.result_cache import ResultCache, digest, load_all


@dataclass(frozen=True)
class Found:
    values: Tensor
    sound: Tensor
    share: Tensor


@dataclass(frozen=True)
class Wider(Found):
    more: Tensor


@pytest.fixture
def made():
    """A part, and the list of calls that made it."""
    calls = []

    def compute():
        calls.append(len(calls))
        return Found(torch.arange(3.0), torch.tensor([True, False]), torch.tensor(0.25))

    return compute, calls


def test_a_part_comes_back_as_it_was_made(tmp_path, made):
    compute, calls = made
    first, again = (ResultCache(tmp_path, {"K": 5}).get_or_compute("here", Found, compute) for _ in range(2))
    assert calls == [0]
    for name, value in vars(first).items():
        assert torch.equal(getattr(again, name), value)
        assert getattr(again, name).dtype == value.dtype


@pytest.mark.parametrize("key", [{"K": 6}, {"K": "5"}, {"K": 5, "seed": 0}, {}])
def test_another_key_makes_the_part_anew(tmp_path, made, key):
    compute, calls = made
    ResultCache(tmp_path, {"K": 5}).get_or_compute("here", Found, compute)
    ResultCache(tmp_path, key).get_or_compute("here", Found, compute)
    assert calls == [0, 1]


def test_the_order_of_a_keys_entries_does_not_matter():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})


@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_truncated_file_is_made_anew(tmp_path, made, keep):
    compute, calls = made
    ResultCache(tmp_path, {}).get_or_compute("here", Found, compute)
    path = tmp_path / "here.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    ResultCache(tmp_path, {}).get_or_compute("here", Found, compute)
    ResultCache(tmp_path, {}).get_or_compute("here", Found, compute)
    assert calls == [0, 1]


def test_a_part_of_another_shape_is_made_anew(tmp_path, made):
    ResultCache(tmp_path, {}).get_or_compute("here", Found, made[0])
    found = ResultCache(tmp_path, {}).get_or_compute(
        "here", Wider, lambda: Wider(**vars(made[0]()), more=torch.ones(1))
    )
    assert torch.equal(found.more, torch.ones(1))


def test_without_a_folder_nothing_is_cached(tmp_path, made, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compute, calls = made
    for _ in range(2):
        ResultCache(None, {}).get_or_compute("here", Found, compute)
    assert calls == [0, 1]
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_cached_each(tmp_path):
    one = torch.ones(3)
    found = ResultCache(tmp_path, {}).get_or_compute("here", Found, lambda: Found(one, one, one[:1]))
    assert torch.equal(found.values, found.sound)


def test_a_part_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ResultCache(tmp_path, {}).get_or_compute("here", Found, fail)
    assert not list(tmp_path.iterdir())


def test_load_all_gives_the_parts_of_one_key_in_order(tmp_path, made):
    now, before = ResultCache(tmp_path, {"K": 5}), ResultCache(tmp_path, {"K": 4})
    for name in ("b.00010", "b.00000", "a"):
        now.get_or_compute(name, Found, made[0])
    before.get_or_compute("old", Found, made[0])
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    assert list(load_all(tmp_path, now.key)) == ["a", "b.00000", "b.00010"]
