"""Finding and loading librazor.so, and its errors as Python exceptions.

The library brings the CUDA runtime along and needs no driver to be loaded: on a machine without
one everything works up to the first launch, which then says what CUDA said.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

from trt_razor.errors import RazorError, UsageError
from trt_razor.kernels import structs

LIBRARY = "librazor.so"
VARIABLE = "TRT_RAZOR_LIBRARY"

_PACKAGE = Path(__file__).resolve().parent


def find_library(path: str | os.PathLike[str] | None = None) -> Path:
    """Where the kernels are: ``path``, else $TRT_RAZOR_LIBRARY, else the package, else a checkout.

    Raises:
        RazorError: there is no such file, or none of the places has one.
    """
    asked = path if path is not None else os.environ.get(VARIABLE) or None
    if asked is not None:
        found = Path(asked)
        if not found.is_file():
            where = "library" if path is not None else f"${VARIABLE}"
            there = "a folder" if found.is_dir() else "nothing"
            raise RazorError(f"{where}: expected the file {LIBRARY}, found {there} at '{found}'")
        return found.resolve()
    beside = _PACKAGE / LIBRARY
    build = _PACKAGE.parents[1] / "build"
    for candidate in (beside, build / LIBRARY, *sorted(build.glob(f"*/{LIBRARY}"))):
        if candidate.is_file():
            return candidate
    raise RazorError(
        f"{LIBRARY}: not found beside the package ('{beside}') nor under '{build}'; build it with "
        f"'make plugin', or set {VARIABLE} to where it is"
    )


class Library:
    """The C API: one method per function, status codes raised as exceptions.

    Args:
        path: see ``find_library``.

    Attributes:
        path: the file that was loaded.
        build_info: version, CUDA version and architectures, as the library says them.

    Raises:
        RazorError: not found, not loadable, or of another API version.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = find_library(path)
        try:
            self._c = ctypes.CDLL(str(self.path))
            self._declare()
        except (OSError, AttributeError) as e:
            text = str(e).replace("\n", " ")
            raise RazorError(
                f"'{self.path}': cannot be loaded as the kernel library: {text}; "
                f"build it on this machine with 'make plugin'"
            ) from None
        version = self._c.razor_api_version()
        if version != structs.API_VERSION:
            raise RazorError(
                f"'{self.path}': expected API version {structs.API_VERSION}, found {version}; "
                f"package and library are of different releases: run 'make plugin' again"
            )
        self.build_info: str = self._c.razor_build_info().decode()

    def _declare(self) -> None:
        layer, limits, call = (
            POINTER(s) for s in (structs.RazorLayer, structs.RazorLimits, structs.RazorCall)
        )
        for name, result, arguments in (
            ("razor_api_version", c_uint32, []),
            ("razor_build_info", c_char_p, []),
            ("razor_last_error", c_char_p, []),
            ("razor_ring_rows", c_int32, [layer]),
            ("razor_check_layer", c_int, [layer]),
            ("razor_workspace_size", c_int, [layer, limits, POINTER(c_size_t)]),
            ("razor_attention", c_int, [layer, call, c_void_p, c_size_t, c_void_p]),
        ):
            function = getattr(self._c, name)
            function.restype = result
            function.argtypes = arguments

    @property
    def last_error(self) -> str:
        """One line about this thread's last failure; empty if there was none."""
        return str(self._c.razor_last_error().decode(errors="replace"))

    def check(self, status: int, doing: str) -> None:
        """Raise what ``status`` means.

        Raises:
            UsageError: a wrong argument, or one there is no kernel for.
            RazorError: everything else.
        """
        if status == structs.OK:
            return
        wrong = status in (structs.INVALID_ARGUMENT, structs.UNSUPPORTED)
        raise (UsageError if wrong else RazorError)(f"{doing}: {self.last_error}")

    def ring_rows(self, layer: structs.RazorLayer) -> int:
        rows = int(self._c.razor_ring_rows(byref(layer)))
        if rows == 0:
            raise UsageError(f"ring_rows: {self.last_error}")
        return rows

    def check_layer(self, layer: structs.RazorLayer) -> None:
        self.check(self._c.razor_check_layer(byref(layer)), "layer")

    def workspace_size(self, layer: structs.RazorLayer, limits: structs.RazorLimits) -> int:
        size = c_size_t()
        status = self._c.razor_workspace_size(byref(layer), byref(limits), byref(size))
        self.check(status, "workspace size")
        return size.value

    def attention(
        self,
        layer: structs.RazorLayer,
        call: structs.RazorCall,
        workspace: int | None,
        workspace_bytes: int,
        stream: int,
    ) -> None:
        status = self._c.razor_attention(
            byref(layer), byref(call), workspace, workspace_bytes, stream or None
        )
        self.check(status, "attention")
