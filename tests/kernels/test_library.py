"""Where the library is looked for, and what is said when it is not usable."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from trt_razor.errors import RazorError, UsageError
from trt_razor.kernels import library as module
from trt_razor.kernels import structs
from trt_razor.kernels.library import Library, find_library


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout: no library anywhere, no variable."""
    package = tmp_path / "trt_razor" / "kernels"
    package.mkdir(parents=True)
    monkeypatch.setattr(module, "_PACKAGE", package)
    monkeypatch.delenv("TRT_RAZOR_LIBRARY", raising=False)
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a library\n")
    return path


def test_the_order_of_places(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = touch(checkout / "build" / "release" / "librazor.so")
    assert find_library() == preset
    build = touch(checkout / "build" / "librazor.so")
    assert find_library() == build
    beside = touch(checkout / "trt_razor" / "kernels" / "librazor.so")
    assert find_library() == beside
    elsewhere = touch(checkout / "elsewhere" / "mine.so")
    monkeypatch.setenv("TRT_RAZOR_LIBRARY", str(elsewhere))
    assert find_library() == elsewhere
    assert find_library(build) == build


def test_nothing_found_says_how_to_build(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RazorError, match=r"librazor\.so: not found .* 'make plugin'") as e:
        find_library()
    assert "\n" not in str(e.value)
    with pytest.raises(
        RazorError, match=r"library: expected the file .* found nothing at '.*x\.so'"
    ):
        find_library(checkout / "x.so")
    with pytest.raises(RazorError, match="found a folder at"):
        find_library(checkout)
    touch(checkout / "build" / "librazor.so")
    monkeypatch.setenv("TRT_RAZOR_LIBRARY", "/nowhere/y.so")  # asked for: no other is taken instead
    with pytest.raises(
        RazorError, match=r"\$TRT_RAZOR_LIBRARY: .* found nothing at '/nowhere/y\.so'"
    ):
        find_library()


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = touch(tmp_path / "librazor.so")
    with pytest.raises(RazorError, match=r"'.*librazor\.so': cannot be loaded .*make plugin") as e:
        Library(path)
    assert "\n" not in str(e.value)


def compiled(folder: Path, source: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    (folder / "x.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", "x.c", "-o", "librazor.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "librazor.so"


FUNCTIONS = ["last_error", "ring_rows", "check_layer", "workspace_size", "attention", "build_info"]


def test_a_library_of_another_version(tmp_path: Path) -> None:
    others = "".join(f"void razor_{name}(void) {{}}\n" for name in FUNCTIONS)
    path = compiled(tmp_path, f"unsigned razor_api_version(void) {{ return 77; }}\n{others}")
    with pytest.raises(RazorError, match=r"expected API version 2, found 77; .*'make plugin'"):
        Library(path)


def test_another_library(tmp_path: Path) -> None:
    path = compiled(tmp_path, "int x;\n")
    with pytest.raises(RazorError, match=r"cannot be loaded as the kernel library: .*razor_"):
        Library(path)


def test_status_codes_become_exceptions(tmp_path: Path) -> None:
    source = """
        unsigned razor_api_version(void) { return 2; }
        const char *razor_build_info(void) { return "0.0 (test)"; }
        const char *razor_last_error(void) { return "head_dim: expected 64, found 80"; }
        int status;
        int razor_check_layer(const void *layer) { return status; }
        void razor_ring_rows(void) {}
        void razor_workspace_size(void) {}
        void razor_attention(void) {}
    """
    library = Library(compiled(tmp_path, source))
    assert library.build_info == "0.0 (test)"
    status = ctypes.c_int.in_dll(library._c, "status")
    library.check_layer(structs.new_layer())
    for code in range(1, 6):
        status.value = code
        with pytest.raises(RazorError, match="layer: head_dim: expected 64, found 80") as e:
            library.check_layer(structs.new_layer())
        wrong = code in (structs.INVALID_ARGUMENT, structs.UNSUPPORTED)
        assert isinstance(e.value, UsageError) == wrong
