"""Tensors on disk: which files are looked at, what is read when, and that writing keeps every byte."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from vistune.models import weights
from vistune.models.weights import Entry, held


def some(**more):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(4).half(),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.randn(7, 2).bfloat16().t(),
        "e": torch.tensor(1.5),
        "f": torch.zeros(0, 3),
    }
    return {name: held(tensor) for name, tensor in (tensors | more).items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name, entry in one.items():
        assert (entry.dtype, entry.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(entry.read(), other[name].read()), name
    return True


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("limit", [10**9, 40])
def test_what_is_written_is_found_again(kind, limit, tmp_path):
    (weights.write if kind == "safetensors" else weights.write_pickles)(tmp_path, some(), limit)
    assert weights.has_weights(tmp_path) and equal(some_of(tmp_path), weights.found(tmp_path))
    for index in tmp_path.glob("*.index.json"):
        said = json.loads(index.read_text())
        assert said["metadata"]["total_size"] == sum(entry.nbytes for entry in weights.found(tmp_path).values())
        index.unlink()
        assert equal(some_of(tmp_path), weights.found(tmp_path))


def some_of(folder):
    """The same by the libraries' own readers."""
    read = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            read |= load_file(file)
        elif file.suffix == ".bin":
            read |= torch.load(file, weights_only=True)
    return {name: held(tensor) for name, tensor in read.items()}


def test_a_pickle_holds_no_more_than_its_tensors(tmp_path):
    """A view is saved without what it is a view of."""
    weights.write_pickle(tmp_path / "one.bin", {"a": held(torch.zeros(1_000_000)[:10])})
    assert (tmp_path / "one.bin").stat().st_size < 10_000


def test_what_is_not_whole_is_said(tmp_path):
    with pytest.raises(ValueError, match="no weights in it"):
        weights.found(tmp_path)
    assert not weights.has_weights(tmp_path)
    weights.write(tmp_path, some(), 40)
    shards = sorted(tmp_path.glob("model-*"))
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"names {shards[0].name}, which is not there"):
        weights.found(tmp_path)
    (tmp_path / weights.INDEX).unlink()
    with pytest.raises(ValueError, match=f"holds {len(shards) - 1} of {len(shards)} shards"):
        weights.found(tmp_path)
    torch.save({"a": torch.zeros(2), "epoch": 3}, tmp_path / weights.PICKLE)
    with pytest.raises(ValueError, match="epoch is a int, not a tensor"):
        weights.found(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / weights.PICKLE)
    with pytest.raises(ValueError, match="holds a list, not a table"):
        weights.found(tmp_path)


def test_rows_grow_by_their_mean_when_they_are_read():
    asked = []
    old = torch.randn(2500, 3, dtype=torch.float64).to(torch.float16)
    entry = Entry(old.dtype, tuple(old.shape), lambda: asked.append(1) or old)
    more = weights.grown(entry, 2560)
    assert more.shape == (2560, 3) and more.dtype == torch.float16 and not asked
    read = more.read()
    assert torch.equal(read[:2500], old) and asked == [1]
    torch.testing.assert_close(read[2500:], old.double().mean(0).half().expand(60, -1), rtol=0, atol=0)
    assert torch.equal(more.rows(2500).read(), old)
    assert weights.grown(entry, 2500) is entry


def test_a_file_as_a_tensor(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)))
    entry = weights.file_bytes(tmp_path / "x")
    assert bytes(entry.read().tolist()) == bytes(range(256)) and entry.dtype == torch.uint8
    weights.write_file(tmp_path / "y", {"x": entry})
    assert bytes(weights.safetensors(tmp_path / "y")["x"].read().tolist()) == bytes(range(256))
