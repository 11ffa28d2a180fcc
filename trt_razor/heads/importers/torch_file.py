"""Files of ``torch.save``: checked before torch sees them, and never unpickled freely.

A ``.pt`` file is a zip archive with a pickle in it, and a pickle is a program. Three doors:

1. the archive: stored (never compressed) members only, few, within the file's own size; those that a
   tensor needs are copied into a fresh archive, so torch reads exactly what was checked here,
2. the pickle's opcodes, listed without running them: it may name nothing but tensors' own parts,
3. ``torch.load(weights_only=True)``, and before a number is read, the storage behind the tensor must have
   the size of its member (torch believes the number in the pickle and would read past the end), and its
   shape must be of a size that heads have (with strides of 0 it may claim any).

No memory mapping: the files have kilobytes, and the copy is what makes the first check hold.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
import zipfile
from typing import Any

import numpy as np

from trt_razor.errors import MissingExtra, UsageError
from trt_razor.models.spec import MAX_HEADS, MAX_LAYERS

MAX_MEMBERS = 64
MAX_PICKLE_BYTES = 1 << 20
MAX_STORAGE_BYTES = 16 << 20

_DATA = re.compile(r"data/\d{1,9}")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {t}Storage" for t in ("BFloat16", "Half", "Float", "Double", "Int", "Long")),
}
_BAD = "damaged, or no file of torch.save"


def load_torch_file(data: bytes, where: str) -> Any:
    """The tensor or the plain value in a file of ``torch.save``.

    Returns:
        a tensor as float64 or int64 array (its values may be NaN), or dicts, lists and numbers.

    Raises:
        UsageError: what is wrong, in one line. MissingExtra: torch is not installed.
    """
    members = _members(data, where)
    tensors = _check_pickle(members["data.pkl"], where)
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtra("torch", "torch", f"{where}: reading a file of torch.save") from None
    try:
        value = torch.load(_archive(members), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds on a damaged file
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise UsageError(f"{where}: {_BAD} ({reason})") from None
    if not isinstance(value, torch.Tensor):
        if tensors:
            raise UsageError(f"{where}: expected one tensor, or a dict of lists; found both")
        return value
    stored = [len(m) for name, m in members.items() if _DATA.fullmatch(name)]
    claimed = value.untyped_storage().nbytes()
    if stored != [claimed]:
        raise UsageError(
            f"{where}: {_BAD}: its tensor claims {claimed} bytes, the file has {sum(stored)}"
        )
    if math.prod(value.shape) > MAX_LAYERS * MAX_HEADS:
        raise UsageError(f"{where}: expected scores of heads, found a tensor {list(value.shape)}")
    kind = torch.float64 if value.is_floating_point() else torch.int64
    array: np.ndarray = value.detach().resolve_neg().to(kind).numpy()
    return array


def _members(data: bytes, where: str) -> dict[str, bytes]:
    """The members that torch needs, named without the folder that torch puts around them."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as e:
        raise UsageError(f"{where}: {_BAD}: cut off? ({e})") from None
    if not 1 <= len(infos) <= MAX_MEMBERS:
        raise UsageError(f"{where}: expected at most {MAX_MEMBERS} members, found {len(infos)}")
    if any(i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1 for i in infos):
        raise UsageError(
            f"{where}: {_BAD}: its members are compressed or encrypted, which torch.save never does"
        )
    total = sum(i.file_size for i in infos)
    if total > len(data) or any(i.file_size != i.compress_size for i in infos):
        raise UsageError(
            f"{where}: {_BAD}: its members claim {total} bytes, the file has {len(data)}"
        )
    names = [i.filename for i in infos]
    pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(set(names)) != len(names) or len(pickles) != 1:
        raise UsageError(f"{where}: {_BAD}: expected one data.pkl in it, found {len(pickles)}")
    prefix = pickles[0].removesuffix("data.pkl")
    if any(n.startswith((prefix + "code/", prefix + "constants.pkl")) for n in names):
        raise UsageError(f"{where}: a TorchScript program; expected scores saved with torch.save")
    out: dict[str, bytes] = {}
    for info in infos:
        name = info.filename.removeprefix(prefix)
        limit = MAX_STORAGE_BYTES if _DATA.fullmatch(name) else MAX_PICKLE_BYTES
        if not (_DATA.fullmatch(name) or name in ("data.pkl", "version", "byteorder")):
            continue
        if info.file_size > limit:
            raise UsageError(
                f"{where}: {name}: expected at most {limit} bytes, found {info.file_size}"
            )
        try:
            out[name] = archive.read(info)
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as e:
            raise UsageError(f"{where}: {_BAD}: {name}: {e}") from None
    order = out.get("byteorder", b"little").decode(errors="replace")
    if order != sys.byteorder:
        raise UsageError(
            f"{where}: expected numbers in {sys.byteorder}-endian order, found {order}"
        )
    return out


def _check_pickle(program: bytes, where: str) -> int:
    """Refuse a pickle that names anything but the parts of a tensor. Runs nothing.

    Returns:
        how many storages it takes from the archive.
    """
    tensors = 0
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "GLOBAL" and argument in _GLOBALS:
                continue
            tensors += opcode.name in ("PERSID", "BINPERSID")
            if opcode.name in ("GLOBAL", "INST"):
                raise UsageError(
                    f"{where}: its pickle wants to run '{str(argument)[:60]}', which no file of head "
                    "scores needs; do not trust this file"
                )
            if opcode.name in (
                "STACK_GLOBAL",
                "EXT1",
                "EXT2",
                "EXT4",
                "OBJ",
                "NEWOBJ",
                "NEWOBJ_EX",
            ):
                raise UsageError(
                    f"{where}: its pickle makes objects ({opcode.name}), which no file of head scores "
                    "needs; expected a tensor or a dict of lists, saved with torch.save"
                )
    except UsageError:
        raise
    except Exception as e:  # pickletools raises several kinds on a damaged program
        raise UsageError(f"{where}: {_BAD}: data.pkl: {str(e)[:120]}") from None
    return tensors


def _archive(members: dict[str, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"scores/{name}", content)
    out.seek(0)
    return out
