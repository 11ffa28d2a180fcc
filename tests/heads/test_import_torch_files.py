"""Hostile and damaged files of torch.save: nothing runs, nothing large is made, one clear line."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import tiny_spec
from import_files import members, rewrite, torch_file

from trt_razor.errors import UsageError
from trt_razor.heads.importers.msmodelslim import MSMODELSLIM
from trt_razor.heads.importers.source import open_source
from trt_razor.heads.importers.torch_file import load_torch_file

LISTS = {"prefix_matching": {0: [1]}, "copying": {}}


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def load(path: Path) -> Any:
    return load_torch_file(path.read_bytes(), str(path))


def refused(words: str, path: Path) -> None:
    with pytest.raises(UsageError) as error:
        load(path)
    text = str(error.value)
    assert words in text
    assert "\n" not in text
    assert text.startswith(f"{path}: ")


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_bomb_does_not_run(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Refused by the list of opcodes, before torch is asked.
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    target = tmp_path / "pwned"
    path = torch_file(tmp_path / "win.pt", LISTS)
    rewrite(path, {"data.pkl": pickle.dumps({"prefix_matching": Bomb(target)}, protocol)})
    refused("its pickle ", path)
    assert not target.exists()
    pickle.loads(members(path)["data.pkl"])  # the bomb is a real one
    assert target.exists()


def test_torch_is_told_to_load_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the list of opcodes torch's own unpickler refuses, too."""
    target = tmp_path / "pwned"
    path = torch_file(tmp_path / "win.pt", LISTS)
    rewrite(path, {"data.pkl": pickle.dumps(Bomb(target), 2)})
    monkeypatch.setattr("trt_razor.heads.importers.torch_file._check_pickle", lambda *a: 0)
    refused("damaged, or no file of torch.save", path)
    assert not target.exists()


def test_a_bare_pickle_is_not_opened(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb(target)))
    torch.save(LISTS, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UsageError, match=r"a bare pickle .* not opened here"):
            _ = open_source(tmp_path / name).kind
    assert not target.exists()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_cut_off(tmp_path: Path, part: float) -> None:
    path = torch_file(tmp_path / "a.pt", torch.rand(30, 8))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused("damaged, or no file of torch.save: cut off?", path)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.rand(4, 2))
    data = path.read_bytes()
    for i in range(0, len(data), 3):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            assert load(path).shape == (4, 2)
        except UsageError:
            continue


def test_wrong_numbers_are_noticed(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.arange(6.0).reshape(3, 2))
    data = path.read_bytes()
    at = data.index(struct.pack("<6f", *range(6)))
    path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    refused("Bad CRC-32", path)


def test_zip_bomb(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.zeros(4, 2))
    rewrite(path, {"data/0": bytes(64 << 20)}, compress=True)
    assert path.stat().st_size < 1 << 20
    refused("compressed or encrypted, which torch.save never does", path)


def test_members_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.zeros(4, 2))
    rewrite(path, {})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data)
    refused("members claim", path)


def test_overlapping_members(tmp_path: Path) -> None:
    """Many names for the same bytes: the sum of their sizes exceeds the file."""
    path = torch_file(tmp_path / "a.pt", torch.zeros(4, 2))
    rewrite(path, {"data/0": bytes(4096)})
    with zipfile.ZipFile(path, "a") as archive:
        big = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
        for n in range(1, 40):
            twin = zipfile.ZipInfo(f"a/data/{n}")
            twin.header_offset, twin.CRC = big.header_offset, big.CRC
            twin.file_size = twin.compress_size = big.file_size
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]
    refused("members claim", path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.pkl": None}, "expected one data.pkl in it, found 0"),
        ({"data/0": None}, "damaged, or no file of torch.save"),
        ({"data/0": bytes(8)}, "damaged, or no file of torch.save"),
        ({"data/0": bytes(64)}, "damaged, or no file of torch.save"),
        ({"data/1": bytes(8)}, "claims 32 bytes, the file has 40"),
        ({"data.pkl": b"\x80\x02"}, "damaged, or no file of torch.save: data.pkl"),
        ({"data.pkl": b"\x80\x02."}, "damaged, or no file of torch.save"),
        ({"data.pkl": b""}, "damaged, or no file of torch.save: data.pkl"),
        ({"data.pkl": b"\x80\x02N0." + bytes(2 << 20)}, "data.pkl: expected at most 1048576 bytes"),
        ({"data/0": bytes(17 << 20)}, "data/0: expected at most 16777216 bytes"),
        ({"byteorder": b"big"}, "expected numbers in little-endian order, found big"),
        ({"code/model.py": b""}, "a TorchScript program"),
        ({"constants.pkl": b""}, "a TorchScript program"),
        ({f"x/{i}": b"" for i in range(70)}, "expected at most 64 members"),
    ],
)
def test_damaged_archives(tmp_path: Path, changes: dict[str, bytes | None], words: str) -> None:
    path = torch_file(tmp_path / "a.pt", torch.zeros(4, 2))
    refused(words, rewrite(path, changes))


@pytest.mark.parametrize("numel", [9, 1 << 20, 1 << 30])
def test_a_storage_that_claims_more_numbers_than_stored(tmp_path: Path, numel: int) -> None:
    """torch takes the pickle's word for the size of a storage, and would read past its end."""
    path = torch_file(tmp_path / "a.pt", torch.zeros(4, 2))
    program = members(path)["data.pkl"]
    old, new = b"K\x08tq", b"J" + struct.pack("<i", numel) + b"tq"
    assert program.count(old) == 1
    refused(
        "damaged, or no file of torch.save", rewrite(path, {"data.pkl": program.replace(old, new)})
    )


def test_a_tensor_of_strides_of_zero(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.zeros(1).expand(1 << 20, 1 << 20))
    refused("found a tensor [1048576, 1048576]", path)


def test_tensors_of_other_kinds(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.zeros(3, 2, dtype=torch.complex64))
    refused("ComplexFloatStorage", path)
    path = torch_file(tmp_path / "a.pt", torch.ones(3, 2, requires_grad=True))
    assert load(path).sum() == 6
    path = torch_file(tmp_path / "a.pt", torch.nn.Parameter(torch.ones(3, 2)))
    refused("torch._utils _rebuild_parameter", path)


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {"prefix_matching": {}}
    value["copying"] = value
    path = torch_file(tmp_path / "a.pt", value)
    assert MSMODELSLIM.fits(open_source(path))
    with pytest.raises(UsageError, match="layer: expected"):
        MSMODELSLIM.read(open_source(path), tiny_spec())
