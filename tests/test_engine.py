"""The engine directory: what loads, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import POLICY, TinyModel

from trt_razor.engine import Engine, foreign_files, is_engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.manifest import Manifest
from trt_razor.planner import cache_bytes


@pytest.fixture
def copy(razor_engine: Engine, tmp_path: Path) -> Path:
    """A copy of the Razor engine that a test may damage."""
    return Path(shutil.copytree(razor_engine.directory, tmp_path / "engine"))


def refusal(directory: Path, verify: bool = True) -> str:
    """The message of a load that must fail; always one line and exit code 1."""
    with pytest.raises(RazorError) as e:
        Engine.load(directory, verify)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 1, str(e.value)
    return str(e.value)


def edit(directory: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> Path:
    """Change a manifest as a hostile hand would: with a matching digest."""
    path = directory / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    if sign:
        data.pop("digest", None)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data))
    return path


# Whole engines --------------------------------------------------------------------------------
def test_manifest_says_what_was_built(razor_engine: Engine, tiny_model: TinyModel) -> None:
    m = Engine.load(razor_engine.directory).manifest
    assert (m.spec, m.checkpoint) == (tiny_model.spec, tiny_model.checkpoint().identity())
    assert (m.backend, m.dtype, m.razor) == ("onnxruntime", "float32", True)
    assert (m.max_seq_len, m.max_batch_size, m.prefill_chunk) == (64, 3, 5)
    assert m.policy == POLICY
    assert m.heads is not None
    assert (m.heads.retrieval_heads, m.heads.share, m.heads.method) == (1, 0.25, "test")
    on_disk = {p for p in razor_engine.directory.rglob("*") if p.is_file()}
    listed = {razor_engine.directory / f.path for f in m.files}
    assert on_disk == listed | {razor_engine.directory / "manifest.json"}
    assert {f.path for f in m.files} >= {"heads.json", "model.onnx", "tokenizer/tokenizer.json"}
    assert foreign_files(razor_engine.directory) == []


def test_dense_manifest(dense_engine: Engine) -> None:
    m = Engine.load(dense_engine.directory).manifest
    assert (m.razor, m.policy, m.heads) == (False, None, None)
    assert m.kv_bytes_per_slot == m.dense_kv_bytes_per_slot == 2 * 2 * 2 * 64 * 8 * 4
    assert not (dense_engine.directory / "heads.json").exists()


def test_manifest_survives_json(razor_engine: Engine) -> None:
    text = json.dumps(razor_engine.manifest.to_json())
    assert Manifest.from_json(json.loads(text), "m") == razor_engine.manifest


def test_a_moved_engine_loads_and_runs(copy: Path, tmp_path: Path) -> None:
    moved = tmp_path / "other place ü" / "engine"
    moved.parent.mkdir()
    copy.rename(moved)
    session = Engine.load(moved).open(1)
    logits = session.forward(0, np.int32([[1, 2]]), np.int32([0]), np.int32([2]), np.int32([[1]]))
    assert np.isfinite(logits).all()


def test_a_read_only_engine_loads(copy: Path) -> None:
    paths = sorted(copy.rglob("*"), reverse=True)
    for p in [*paths, copy]:
        p.chmod(0o555 if p.is_dir() else 0o444)
    try:
        before = {p: p.stat().st_mtime_ns for p in [*paths, copy]}
        assert Engine.load(copy).open(1).kv_bytes > 0
        assert {p: p.stat().st_mtime_ns for p in [*paths, copy]} == before
    finally:
        for p in [copy, *paths]:
            p.chmod(0o755 if p.is_dir() else 0o644)


def test_progress_counts_every_byte(razor_engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    Engine.load(razor_engine.directory, True, lambda done, total: seen.append((done, total)))
    total = sum(f.size for f in razor_engine.manifest.files)
    assert seen[-1] == (total, total)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_slots_within_the_engine(razor_engine: Engine) -> None:
    for slots in (0, -1, 4):
        with pytest.raises(UsageError, match=r"slots: expected 1\.\.3"):
            razor_engine.open(slots)


# KV bytes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("comp_tokens", [None, 0, 1, 4])
def test_session_holds_the_planners_bytes(
    comp_tokens: int | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    razor = comp_tokens is not None
    policy = replace(POLICY, comp_tokens=comp_tokens or 0)
    engine = tiny_model.build(tmp_path / "e", razor, policy=policy)
    head_map = HeadMap.load(tiny_model.heads) if razor else None
    for slots in (1, 3):
        planned = cache_bytes(tiny_model.spec, head_map, policy, 64, slots, "float32")
        session: Any = engine.open(slots)
        assert session.kv_bytes == planned.total
        assert engine.manifest.kv_bytes_per_slot * slots == planned.total
        # The bytes NumPy holds, counted without the session's own sum.
        arrays = [session.cache(t.name) for t in engine.caches()]
        assert all(a.base is None and a.flags.owndata for a in arrays)
        assert sum(a.size * a.itemsize for a in arrays) == planned.total
        assert len({a.ctypes.data for a in arrays}) == len(arrays)


# No engine ------------------------------------------------------------------------------------
def test_what_is_no_engine_is_wrong_use(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (copy / "manifest.json").unlink()
    for path, words in [
        (tmp_path / "nothing", "no such engine directory"),
        (tmp_path / "file", "found a file"),
        (tmp_path / "empty", "not an engine, or its build did not finish"),
        (copy, "not an engine, or its build did not finish"),
    ]:
        with pytest.raises(UsageError, match=words) as e:
            Engine.load(path)
        assert str(path) in str(e.value)
        assert e.value.exit_code == 2
        assert not is_engine(path)


# Damage ---------------------------------------------------------------------------------------
def test_every_file_missing_truncated_or_flipped_is_named(copy: Path) -> None:
    names = [f.path for f in Engine.load(copy).manifest.files]
    assert len(names) >= 5
    for name in names:
        path = copy / name
        data = path.read_bytes()
        path.unlink()
        assert refusal(copy).startswith(f"{path}: missing")
        path.mkdir()
        assert refusal(copy).startswith(f"{path}: missing")
        path.rmdir()
        for cut in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
            path.write_bytes(cut)
            for verify in (True, False):
                assert refusal(copy, verify).startswith(f"{path}: size: expected {len(data)}")
        for at in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert refusal(copy).startswith(f"{path}: sha256")
        path.write_bytes(data)
    Engine.load(copy)


def test_truncated_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    for n in [*range(0, len(data) - 2, 97), len(data) - 3]:
        path.write_bytes(data[:n])
        assert refusal(copy).startswith(f"{path}: ")
        assert not is_engine(copy)


def test_no_flipped_byte_of_the_manifest_goes_unseen(copy: Path) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    original = json.loads(data)
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 300, replace=False):
        damaged = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == original  # white space, for one
        except ValueError:
            same = False
        if same:
            Engine.load(copy, verify=False)
        else:
            assert str(path) in refusal(copy, verify=False)


@pytest.mark.parametrize("content", [
    b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}',
    b'{"schema": "trt_razor.headmap", "version": 1}', b'{"schema": "trt_razor.engine"}',
])  # fmt: skip
def test_manifest_that_is_something_else(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    assert refusal(copy).startswith(f"{copy / 'manifest.json'}: ")


def test_manifest_of_odd_kinds(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    monkeypatch.setattr("trt_razor.manifest.MAX_MANIFEST_BYTES", len(data) - 1)
    assert "too large" in refusal(copy)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    assert "expected a file" in refusal(copy)
    path.unlink()
    path.mkdir()
    assert "expected a file" in refusal(copy)


@pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None])
def test_other_version(copy: Path, version: Any) -> None:
    edit(copy, lambda d: d.update(version=version))
    assert "version: expected 1, found" in refusal(copy)
    assert "rebuild" in refusal(copy)
    assert is_engine(copy)  # so that --force may replace it


def test_edited_by_hand(copy: Path) -> None:
    edit(copy, lambda d: d.update(max_batch_size=4), sign=False)
    assert "digest: does not match the content" in refusal(copy)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def change(data: Any) -> None:
        for key in parents:
            data = data[int(key) if key.isdigit() else key]
        if value is ...:
            del data[last]
        else:
            data[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize("field, value", [
    ("created", 3), ("trt_razor", None), ("checkpoint", ["x"]), ("backend", ...),
    ("facts", []), ("facts.onnxruntime", {"a": 1}),
    ("razor", 1), ("razor", False), ("policy", None), ("policy", ...), ("heads", None),
    ("policy.sink_tokens", -1), ("policy.min_window", 0), ("policy.compression", "5"),
    ("policy.comp_tokens", True), ("policy.comp_tokens", 10**6), ("policy.new", 1),
    ("heads.share", "much"), ("heads.share", float("nan")), ("heads.retrieval_heads", "3"),
    ("heads.method", ...), ("heads.digest", 7),
    ("dtype", "int8"), ("dtype", 4),
    ("max_seq_len", 0), ("max_seq_len", -5), ("max_seq_len", 10**9), ("max_seq_len", 64.0),
    ("max_seq_len", 129), ("max_batch_size", 0), ("max_batch_size", 10**30),
    ("prefill_chunk", -1), ("prefill_chunk", None),
    ("kv_bytes_per_slot", 1), ("kv_bytes_per_slot", "1"), ("dense_kv_bytes_per_slot", ...),
    ("model", []), ("model", ...), ("model.fingerprint", "00"), ("model.num_layers", 10**12),
    ("model.num_layers", False), ("model.num_heads", 0), ("model.num_kv_heads", 3),
    ("model.rope", None), ("model.rope.theta", "x"), ("model.rope.attention_factor", [1]),
    ("model.eos_token_ids", 2), ("model.eos_token_ids", [[2]]), ("model.bos_token_id", "1"),
    ("model.position", "none"), ("model.rms_norm_eps", float("inf")),
    ("model.vocab_size", -1), ("model.extra", 1), ("model.name", None),
    ("files", {}), ("files.0", "model.onnx"), ("files.0.size", -1), ("files.0.size", True),
    ("files.0.sha256", "zz"), ("files.0.sha256", ...), ("files.0.path", ""), ("new field", 1),
])  # fmt: skip
def test_wrong_field_is_named(copy: Path, field: str, value: Any) -> None:
    path = edit(copy, _set(field, value))
    message = refusal(copy, verify=False)
    assert message.startswith(f"{path}: ")
    parts = [p for p in field.split(".") if not p.isdigit()]
    # A type or range names the field itself; a changed shape may show in the fingerprint.
    assert parts[-1] in message or "fingerprint" in message or "razor is" in message, message


@pytest.mark.parametrize("path", [
    "../secret", "/etc/hostname", "tokenizer/../../x", "a\\b", "C:x", "..", ".", "a\0b", "x\ny",
])  # fmt: skip
def test_paths_that_leave_the_folder(copy: Path, path: str) -> None:
    edit(copy, _set("files.0.path", path))
    message = refusal(copy, verify=False)
    assert "files[0].path" in message
    assert "leaves the engine folder" in message


def test_head_map_must_be_the_engines(copy: Path, tiny_model: TinyModel) -> None:
    """Even with sizes and hashes made to match."""
    path = copy / "heads.json"
    original = HeadMap.load(path)

    def resign(data: dict[str, Any]) -> None:
        for f in data["files"]:
            if f["path"] == "heads.json":
                f["size"] = path.stat().st_size
                f["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    replace(original, retrieval_heads=((1,), ())).save(path)
    edit(copy, resign)
    assert "not the head map this engine was built with" in refusal(copy)
    replace(original, fingerprint="0" * 64).save(path)
    edit(copy, resign)
    assert "head map is of model" in refusal(copy)
    path.write_text("{")
    edit(copy, resign)
    assert "not valid JSON" in refusal(copy)
    edit(copy, lambda d: d.update(files=[f for f in d["files"] if f["path"] != "heads.json"]))
    assert "not listed in manifest.json" in refusal(copy)


def test_tokenizer_only_if_it_is_the_engines(copy: Path) -> None:
    assert Engine.load(copy).tokenizer() is not None
    edit(copy, lambda d: d.update(files=[f for f in d["files"] if "tokenizer" not in f["path"]]))
    assert Engine.load(copy).tokenizer() is None


def test_graph_of_another_engine(copy: Path, dense_engine: Engine) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(dense_engine.directory / name, copy / name)

    def resign(data: dict[str, Any]) -> None:
        for f in data["files"]:
            content = (copy / f["path"]).read_bytes()
            f["size"], f["sha256"] = len(content), hashlib.sha256(content).hexdigest()

    edit(copy, resign)
    with pytest.raises(RazorError, match="cache tensor"):
        Engine.load(copy).open(1)


def test_unreadable_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.open

    def deny(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("model.onnx"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", deny)
    assert refusal(copy) == f"{copy / 'model.onnx'}: cannot read: Permission denied"


def test_foreign_files(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    (copy / "tokenizer" / "extra").write_text("mine")
    assert foreign_files(copy) == ["notes.txt", "tokenizer/extra"]
    (copy / "manifest.json").write_text(
        '{"schema": "trt_razor.engine", "files": [{"path": []}, 3]}'
    )
    assert "model.onnx" in foreign_files(copy)
