"""Files of head scores in the published forms of other projects, made by the tests."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

DUO_CONFIG = {
    "model_name": "models/tiny",
    "sink_size": 128,
    "recent_size": 256,
    "reg_weight": 0.05,
    "num_steps": 2000,
    "threshold": 0.5,
    "sparsity": None,
}


def duo_folder(folder: Path, table: Any, config: Any = None) -> Path:
    """As DuoAttention's train.py leaves it: numpy.savetxt and its arguments as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "full_attention_heads.tsv", np.array(table), delimiter="\t")
    (folder / "config.json").write_text(json.dumps(DUO_CONFIG if config is None else config))
    return folder


def freekv_file(path: Path, table: Any, tail: str = "") -> Path:
    """As in razor_patterns: one decimal, line ends of Windows, no config.json."""
    lines = ["\t".join(f"{x:.1f}" for x in row) + "\r\n" for row in table]
    path.write_bytes(("".join(lines) + tail).encode())
    return path


def headkv_file(path: Path, table: Any) -> Path:
    """``table``: [layers][query heads] lists of scores; one line of JSON."""
    data = {f"{i}-{j}": runs for i, row in enumerate(table) for j, runs in enumerate(row)}
    path.write_text(json.dumps(data))
    return path


def torch_file(path: Path, value: Any, device: str = "cpu") -> Path:
    """torch.save; ``device``: where the pickle says that its tensors were (KVzip: cuda:0)."""
    torch.save(value, path)
    if device != "cpu":
        old, new = (b"X" + len(d).to_bytes(4, "little") + d for d in (b"cpu", device.encode()))
        program = members(path)["data.pkl"]
        assert program.count(old) == 1
        rewrite(path, {"data.pkl": program.replace(old, new)})
    return path


def members(path: Path) -> dict[str, bytes]:
    """Content of a file of torch.save by name, without the folder in front."""
    with zipfile.ZipFile(path) as archive:
        return {n.split("/", 1)[1]: archive.read(n) for n in archive.namelist()}


def rewrite(path: Path, changes: dict[str, bytes | None], compress: bool = False) -> Path:
    """The same archive with other members; None leaves one out."""
    content = {k: v for k, v in {**members(path), **changes}.items() if v is not None}
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, value in content.items():
            archive.writestr(f"{path.stem}/{name}", value)
    path.write_bytes(data.getvalue())
    return path
