"""The CPU shim itself: it computes what a GPU computes, and catches what it should catch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

# Infinities and NaN are among the numbers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]

_SELFTEST = "razor_shim_selftest"
_PLAIN, _SANITIZED = "shim", "shim-sanitize"


def _two_places(one: str, other: str) -> str:
    """Which of them is first depends on the seed."""
    return (
        rf"of a (warp|block) at different places: (?=.*at {one})(?=.*at {other})this (lane|warp) "
    )


CRASHES = {
    "other_collective": _two_places("shuffle ", "sync_warp"),
    "other_place": _two_places(r"sync_warp .*, lane \d+ at", "sync_warp"),
    "other_type": _two_places("mma<__half>", "mma<__nv_bfloat16>"),
    "lane_left": _two_places("the kernel's end", "sync_warp"),
    "lane_left_block": _two_places("the kernel's end", "sync_block"),
    "warp_left": r"(has|have) left the kernel",
    "warps_at_other_places": _two_places(r"sync_block .*, warp \d+ at", "sync_block"),
    "part_of_a_warp": r"shuffle_xor \(selftest\.cpp:\d+\) in a warp of 8 lanes",
    "copy_to_misaligned": r"copy_async16 to shared memory \(.*\): address \w+ is no multiple of 16",
    "copy_from_misaligned": r"copy_async16 \(selftest.*\): address \w+ is no multiple of 16",
    "copy_beyond_shared": r"copy_async16 to .*: from byte 1024 on of 1024 bytes of shared memory",
    "copy_to_global": r"copy_async16 to .*: from byte -?\d+ on of 1024 bytes of shared memory",
    "matrix_misaligned": r"load_matrix_x4 \(.*\): address \w+ is no multiple of 16",
    "matrix_beyond_shared": r"load_matrix_x4_trans \(.*\): from byte 1024 on of 1024 bytes",
    "load_misaligned": r"load_once \(.*\): address \w+ is no multiple of 16",
    "shuffle_beyond_warp": r"shuffle_xor \(.*\) of lane \d+",
}
UNSANITIZED_CRASHES = {
    "write_beyond_shared": r"something wrote beyond the 1024 bytes of shared memory",
    "write_below_shared": r"something wrote below shared memory",
}
SANITIZED_CRASHES = {
    "write_beyond_shared": r"heap-buffer-overflow",
    "write_below_shared": r"heap-buffer-overflow",
    "read_beyond_shared": r"heap-buffer-overflow",
    "write_beyond_global": r"heap-buffer-overflow",
    "copy_beyond_global": r"heap-buffer-overflow",
    "write_misaligned": r"misaligned address \w+ for type 'struct uint4'",
    "shift_too_far": r"left shift of \d+ by \d+ places",
}


@pytest.fixture(scope="module")
def selftest(shim_library: Path) -> Path:
    """The self-test, which the build of the library leaves beside it."""
    return shim_library.parent / _SELFTEST


@pytest.fixture(scope="module")
def sanitized_selftest(selftest: Path) -> Path:
    """The same with sanitizers; only the shim is compiled for it, not the kernels."""
    folder = selftest.parent.parent / _SANITIZED
    source = Path(__file__).parent
    for command in (
        ["cmake", "-S", str(source), "-B", str(folder), "-DRAZOR_SHIM_SANITIZE=ON"],
        ["cmake", "--build", str(folder), "--target", _SELFTEST],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / _SELFTEST


def _run(executable: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_checks(selftest: Path) -> None:
    done = _run(selftest)
    assert done.returncode == 0, done.stdout + done.stderr


def test_checks_with_sanitizers(sanitized_selftest: Path) -> None:
    done = _run(sanitized_selftest, ASAN_OPTIONS="detect_stack_use_after_return=1")
    assert done.returncode == 0, done.stdout + done.stderr


def _assert_crash(executable: Path, name: str, message: str, seed: int) -> str:
    done = _run(executable, "crash", name, RAZOR_SHIM_SEED=str(seed))
    assert done.returncode not in (0, 2), f"{name} was not noticed"
    assert re.search(message, done.stderr), done.stderr
    return done.stderr


@pytest.mark.parametrize("name", CRASHES)
def test_crash(selftest: Path, sanitized_selftest: Path, name: str) -> None:
    for executable in (selftest, sanitized_selftest):
        for seed in range(4):
            stderr = _assert_crash(executable, name, CRASHES[name], seed)
            kernel = "shuffle_all<int>" if name == "part_of_a_warp" else "crash_kernel"
            assert kernel in stderr
            assert "thread (" in stderr
            assert f"seed {seed}, launch 1" in stderr


@pytest.mark.parametrize("name", UNSANITIZED_CRASHES)
def test_crash_without_sanitizers(selftest: Path, name: str) -> None:
    assert "block (" in _assert_crash(selftest, name, UNSANITIZED_CRASHES[name], 0)


@pytest.mark.parametrize("name", SANITIZED_CRASHES)
def test_crash_with_sanitizers(sanitized_selftest: Path, name: str) -> None:
    stderr = _assert_crash(sanitized_selftest, name, SANITIZED_CRASHES[name], 0)
    assert "selftest.cpp" in stderr


# Conversions --------------------------------------------------------------------------------------


def _convert(
    selftest: Path, name: str, values: npt.NDArray[np.generic], dtype: npt.DTypeLike
) -> npt.NDArray[np.generic]:
    done = subprocess.run(
        [selftest, "convert", name], input=values.tobytes(), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, dtype)


def _assert_same(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> None:
    """Same bits, signs of zeros included; any NaN is as good as another."""
    nan = np.isnan(expected.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float64)), nan)
    bits = f"u{expected.itemsize}"
    np.testing.assert_array_equal(found.view(bits)[~nan], expected.view(bits)[~nan])


def _all_16_bit() -> npt.NDArray[np.uint16]:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def _floats() -> npt.NDArray[np.float32]:
    """All signs, exponents and leading bits; behind them what is near a rounding boundary."""
    low = np.unique(
        (np.arange(0, 1 << 16, 1 << 12)[:, None] + np.array([-1, 0, 1])).ravel() & 0xFFFF
    )
    edges = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16) | low.astype(np.uint32)
    anything = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    return np.concatenate([edges.ravel(), anything]).view(np.float32)


@pytest.mark.parametrize(
    "name, dtype", [("fp32_fp16", np.float16), ("fp32_bf16", ml_dtypes.bfloat16)]
)
def test_rounding(selftest: Path, name: str, dtype: npt.DTypeLike) -> None:
    floats = _floats()
    _assert_same(_convert(selftest, name, floats, dtype), floats.astype(dtype))


def test_rounding_to_fp8_saturates(selftest: Path) -> None:
    floats = _floats()
    expected = np.clip(floats, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    _assert_same(_convert(selftest, "fp32_fp8", floats, ml_dtypes.float8_e4m3fn), expected)


@pytest.mark.parametrize(
    "name, dtype", [("fp16_fp32", np.float16), ("bf16_fp32", ml_dtypes.bfloat16)]
)
def test_widening(selftest: Path, name: str, dtype: npt.DTypeLike) -> None:
    values = _all_16_bit()
    expected = values.view(dtype).astype(np.float32)
    _assert_same(_convert(selftest, name, values, np.float32), expected)


@pytest.mark.parametrize(
    "name, dtype", [("fp8_fp16", np.float16), ("fp8_bf16", ml_dtypes.bfloat16)]
)
def test_from_fp8(selftest: Path, name: str, dtype: npt.DTypeLike) -> None:
    """device.cuh's, every byte in every place; it makes 480 of NaN, which caches do not hold."""
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected[[0x7F, 0xFF]] = 480, -480
    four = np.stack([np.roll(codes, i * 37) for i in range(4)], axis=1)
    found = _convert(selftest, name, four, dtype)
    _assert_same(found, expected[four].ravel().astype(dtype))


@pytest.mark.parametrize(
    "name, dtype, least",
    [("multiply_fp16", np.float16, -24), ("multiply_bf16", ml_dtypes.bfloat16, -133)],
)
def test_product_is_rounded_once(
    selftest: Path, name: str, dtype: npt.DTypeLike, least: int
) -> None:
    mantissa = 10 if dtype == np.float16 else 7
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 16, (1 << 19, 2), dtype=np.uint16)
    pairs = bits.view(dtype).astype(np.float64)
    exact = pairs[:, 0] * pairs[:, 1]
    # Spacing of the numbers around the product; all of this is exact in float64.
    _, exponent = np.frexp(exact)
    spacing = np.ldexp(1.0, np.maximum(exponent - 1 - mantissa, least))
    keep = np.isfinite(exact) & (np.abs(exact) < float(ml_dtypes.finfo(dtype).max))
    expected = (np.rint(exact[keep] / spacing[keep]) * spacing[keep]).astype(dtype)
    assert (
        np.count_nonzero(np.abs(exact[keep]) < np.ldexp(1.0, least + mantissa)) > 1000
    )  # subnormal
    _assert_same(_convert(selftest, name, bits[keep], dtype), expected)
