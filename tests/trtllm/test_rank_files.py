"""The streaming safetensors writer, read back by the safetensors library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trt_razor.errors import RazorError
from trt_razor.trtllm.rank_files import RankFile, rank_path

Array = np.ndarray[Any, Any]


def samples() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((6, 5)).astype(np.float32)
    return {
        "bytes": rng.integers(-128, 128, (3, 7)).astype(np.int8),
        "fp8": noise.astype(ml_dtypes.float8_e4m3fn),
        "half": noise.astype(np.float16),
        "brain": noise.astype(ml_dtypes.bfloat16),
        "slopes": noise[0].reshape(1, 5, 1, 1),
        "scalar": np.array(0.25, np.float32),
        "empty": np.zeros((0, 5), np.float16),
    }


def header(values: dict[str, Array]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (value.dtype.name, value.shape) for name, value in values.items()}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_can_be_read_in_torch(tmp_path: Path) -> None:
    values = samples()
    path = rank_path(tmp_path, 3)
    assert path.name == "rank3.safetensors"
    with RankFile(path, header(values), {"made": "here"}) as file:
        for name in reversed(values):  # any order
            file.add(name, values[name])
    found = load_file(path)
    assert set(found) == set(values)
    dtypes = {
        "bytes": torch.int8,
        "fp8": torch.float8_e4m3fn,
        "half": torch.float16,
        "brain": torch.bfloat16,
        "slopes": torch.float32,
        "scalar": torch.float32,
        "empty": torch.float16,
    }
    for name, tensor in found.items():
        assert tensor.dtype == dtypes[name]
        assert tuple(tensor.shape) == values[name].shape
        assert as_bytes(tensor) == values[name].tobytes()
    with safe_open(path, framework="pt") as f:
        assert f.metadata() == {"made": "here"}


def test_tensors_are_aligned(tmp_path: Path) -> None:
    values = samples()
    path = tmp_path / "x.safetensors"
    with RankFile(path, header(values)) as file:
        offsets = {name: file._data + offset for name, offset in file._offsets.items()}
        for name, value in values.items():
            file.add(name, value)
    data = path.read_bytes()
    assert (
        len(data) == file._data + sum(v.nbytes for v in values.values()) == file._data + file.nbytes
    )
    for name, value in values.items():
        assert offsets[name] % value.itemsize == 0
        assert data[offsets[name] :][: value.nbytes] == value.tobytes()


def test_rows_come_in_any_order(tmp_path: Path) -> None:
    whole = np.arange(70, dtype=np.float32).reshape(10, 7)
    path = tmp_path / "x.safetensors"
    with RankFile(path, {"w": ("float32", (10, 7)), "b": ("float32", (10,))}) as file:
        file.add("w", whole[6:], row=6)
        file.add("b", whole[2:, 0], row=2)
        file.add("w", whole[:1])
        file.add("b", whole[:2, 0])  # a strided view
        file.add("w", whole[1:6], row=1)
    found = load_file(path)
    assert np.array_equal(found["w"].numpy(), whole)
    assert np.array_equal(found["b"].numpy(), whole[:, 0])


def test_fp8_may_come_as_bytes(tmp_path: Path) -> None:
    raw = np.arange(100, dtype=np.uint8).reshape(10, 10)
    path = tmp_path / "x.safetensors"
    with RankFile(path, {"w": ("float8_e4m3fn", (10, 10))}) as file:
        file.add("w", raw)
    assert np.array_equal(load_file(path)["w"].view(torch.uint8).numpy(), raw)


@pytest.mark.parametrize(
    "name, value, row, message",
    [
        ("v", np.zeros((4, 2), np.float16), 0, "no tensor v in its header"),
        ("w", np.zeros((4, 2), np.float32), 0, "w: expected float16, found float32"),
        ("w", np.zeros((4, 2), np.uint8), 0, "w: expected float16, found uint8"),
        ("w", np.zeros((4, 3), np.float16), 0, r"w: expected \[4, 2\], found \[4, 3\] at row 0"),
        ("w", np.zeros((8,), np.float16), 0, r"w: expected \[4, 2\], found \[8\] at row 0"),
        ("w", np.zeros((), np.float16), 0, r"w: expected \[4, 2\], found \[\] at row 0"),
        ("w", np.zeros((4, 2), np.float16), 1, r"found \[4, 2\] at row 1"),
        ("w", np.zeros((1, 2), np.float16), -1, r"found \[1, 2\] at row -1"),
        ("s", np.zeros((1,), np.float16), 0, r"s: expected \[\], found \[1\] at row 0"),
    ],
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, name: str, value: Array, row: int, message: str
) -> None:
    tensors = {"w": ("float16", (4, 2)), "s": ("float16", ())}
    file = RankFile(tmp_path / "x.safetensors", tensors)
    with file._file, pytest.raises(RazorError, match=message):
        file.add(name, value, row)


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    with RankFile(tmp_path / "x", {"w": ("int8", (4, 2))}) as file:
        file.add("w", np.zeros((2, 2), np.int8), row=1)
        for row in (0, 1, 2):
            with pytest.raises(RazorError, match=f"w: rows {row}..{row + 1} written twice"):
                file.add("w", np.zeros((2, 2), np.int8), row)
        file.add("w", np.ones((1, 2), np.int8))
        file.add("w", np.ones((1, 2), np.int8), row=3)
    assert load_file(tmp_path / "x")["w"][:, 0].tolist() == [1, 0, 0, 1]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    tensors = {"a": ("float16", (2, 2)), "b": ("float16", ()), "c": ("float16", (0,))}
    with (
        pytest.raises(RazorError, match=r"x: 2 tensors incomplete: a, b$"),
        RankFile(tmp_path / "x", tensors) as file,
    ):
        file.add("a", np.zeros((1, 2), np.float16))
    assert file._file.closed


def test_an_error_inside_is_not_covered_up(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RankFile(tmp_path / "x", {"a": ("float16", (2,))}) as file:
        raise KeyError
    assert file._file.closed


def test_unknown_dtype_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match=r"a: dtype: expected float32, .*, found int64"):
        RankFile(tmp_path / "x", {"a": ("int64", (2,))})
    assert not (tmp_path / "x").exists()
