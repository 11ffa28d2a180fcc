"""benchmarks/kernel_cases.py: what is counted, averaged and written. And ptxas's report as a table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trt_razor.kernels import Caches, ContiguousView, LayerConfig
from trt_razor.policy import RazorPolicy

ROOT = Path(__file__).resolve().parents[1]


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cases = _load("benchmarks/kernel_cases.py")
resources = _load("plugins/kernels/resources.py")
LLAMA, PAPER = cases.SHAPES[0], RazorPolicy()


# Bytes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.0, 0.15, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("heads", [1, 8, 32])
def test_mixture_averages_to_the_share(share: float, heads: int) -> None:
    parts = cases.mixture(share, heads)
    assert sum(w for _, w in parts) == pytest.approx(1)
    assert sum(r * w for r, w in parts) == pytest.approx(share * heads)
    assert all(0 <= r <= heads and w > 0 for r, w in parts)


def test_share_of_whole_heads_is_one_layer() -> None:
    assert cases.mixture(0.125, 8) == ((1, 1.0),)
    assert cases.mixture(1.0, 8) == ((8, 1.0),)
    assert [r for r, _ in cases.mixture(0.15, 1)] == [0, 1]


def test_bytes_of_a_small_step_by_hand() -> None:
    """D = 64, 2 KV heads, 10 tokens cached and one new; sinks 2, window 4: 4 rows dropped."""
    shape, policy = cases.Shape("x", 4, 2, 64), RazorPolicy(2, 4, None, comp_tokens=3)
    row = 2 * 64 * 2
    assert cases.dense_bytes(shape, 5, 10) == 5 * 2 * 11 * row
    local = (2 + 4 + 1) * row + 3 * (2 * 64 + 1) * 4
    assert cases.razor_bytes(shape, 5, 10, 1, policy) == 5 * (11 * row + local)


def test_nothing_dropped_reads_what_dense_reads() -> None:
    assert PAPER.dropped(4000) == 0
    for retrieval in (0, 3, 8):
        found = cases.razor_bytes(LLAMA, 2, 4000, retrieval, PAPER)
        assert found == cases.dense_bytes(LLAMA, 2, 4000)


def test_byte_ratio_of_the_paper_setting() -> None:
    """0.15 + 0.85 / 5 of the bytes, about 3.1 times fewer, at lengths beyond 20,000."""
    parts = cases.mixture(0.15, 8)
    read = sum(w * cases.razor_bytes(LLAMA, 1, 131072, r, PAPER) for r, w in parts)
    assert cases.dense_bytes(LLAMA, 1, 131072) / read == pytest.approx(1 / 0.32, rel=1e-3)


@pytest.mark.parametrize("retrieval", [0, 3, 8])
def test_cache_size_is_that_of_the_layout(retrieval: int) -> None:
    """The binding's own caches of four slots."""
    policy = RazorPolicy(4, 20, 5)
    layer = LayerConfig(32, 8, 128, 500, policy, tuple(range(retrieval)))
    caches = Caches.empty(layer, 4, "cpu")
    views = [v for v in (caches.full, caches.local) if isinstance(v, ContiguousView)]
    found = sum(t.nbytes for v in views for t in (v.k, v.v))
    assert cases.cache_size(LLAMA, 4, 500, retrieval, policy) == found


@pytest.mark.parametrize(
    "read, room, copies", [(1 << 30, 5, 1), (50 << 20, 5, 4), (50 << 20, 2, 2), (1, 1000, 64)]
)
def test_copies_past_l2(read: int, room: int, copies: int) -> None:
    assert cases.copies_past_l2(read, 50 << 20, room) == copies


# Statistics ---------------------------------------------------------------------------------------
def test_timing() -> None:
    timing = cases.Timing.of([5.0, *[3.0] * 8, 100.0, 1.0])
    assert (timing.median, timing.low, timing.high, timing.repeats) == (3, 3, 5, 11)
    mean = cases.Timing.average([(timing, 0.25), (cases.Timing(7, 5, 9, 4), 0.75)])
    assert (mean.median, mean.low, mean.high, mean.repeats) == (6, 4.5, 8, 4)
    with pytest.raises(ValueError, match="no samples"):
        cases.Timing.of([])


def _document() -> dict[str, Any]:
    timing = cases.Timing(100, 90, 120, 10)
    peers = {"flashinfer": cases.Timing(290, 280, 300, 10), "sdpa": "memory does not suffice"}
    case = cases.DecodeCase(LLAMA, 8, 32768, 0.125)
    prefill = cases.PrefillCase(LLAMA, 131072, 4096, 1.0)
    rows = [
        cases.decode_result(case, PAPER, [(timing, 1.0)], peers, 4e12, 1e-3),
        cases.prefill_result(prefill, [(timing, 1.0)], peers, 1e-3),
    ]
    machine = {"gpu": "NVIDIA X", "driver": "1", "versions": "torch 2", "clocks": "SM 1 MHz"}
    return {
        "machine": machine,
        "copy_tb_per_s": 4.0,
        "method": "How.",
        "rows": rows,
        "left_out": ["llama-2-7b batch 32 × 512K: memory does not suffice"],
    }


def test_decode_result() -> None:
    row = _document()["rows"][0]
    assert row["bytes"] == cases.razor_bytes(LLAMA, 8, 32768, 1, PAPER)
    assert row["tb_per_s"] == pytest.approx(row["bytes"] / 100e-6 / 1e12)
    assert row["share_of_copy"] == pytest.approx(row["tb_per_s"] / 4)
    assert row["peers"]["flashinfer"]["speedup"] == pytest.approx(2.9)
    assert row["peers"]["sdpa"] == "memory does not suffice"
    assert cases.best_speedup(row) == pytest.approx(2.9)


def test_markdown() -> None:
    text = cases.markdown(_document())
    tables = [x for x in text.split("\n\n") if x.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| llama-3-8b | 8 | 32K | 0.125 | 100.0 (90.0 – 120.0) |" in tables[0]
    assert tables[0].rstrip().endswith("| 2.90 | – |")
    assert "| llama-3-8b | 128K | 4K | 1 | 0.10 (0.09 – 0.12) | 2.90 | – |" in tables[1]
    assert "4.00 TB/s" in text
    assert "* llama-2-7b batch 32 × 512K: memory does not suffice" in text


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases.draw(_document(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    cases.draw({**_document(), "rows": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# Registers and spills -----------------------------------------------------------------------------
LOG = """\
[3/14] Building CUDA object decode_128.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5razor6decode13decode_kernelI6__halfLi128ELb0EEEvNS_6ParamsEPiPf' for 'sm_80'
ptxas info    : Function properties for _ZN5razor6decode13decode_kernelI6__halfLi128ELb0EEEvNS_6ParamsEPiPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1712 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN5razor13append_kernelI13__nv_bfloat16EEvNS_6ParamsE' for 'sm_120'
ptxas info    : Function properties for _ZN5razor13append_kernelI13__nv_bfloat16EEvNS_6ParamsE
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 512 bytes smem, 400 bytes cmem[0]
"""
SASS = """\
\t\tFunction : _ZN5razor6decode13decode_kernelI6__halfLi128ELb0EEEvNS_6ParamsEPiPf
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R9], [R2.64] ;  /* 0x0000 */
        /*0020*/                   LDSM.16.M88.4 R8, [R4] ;    /* 0x0000 */
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;  /* 0x0000 */
        /*0040*/               @P1 EXIT ;                      /* 0x0000 */
        /*0050*/                   NOP;                        /* 0x0000 */
"""


def test_resources_of_a_log() -> None:
    kernels = resources.collect(LOG, {"80": SASS})
    assert [(k.name, k.arguments) for k in kernels] == [
        ("append_kernel", ("bf16",)),
        ("decode_kernel", ("fp16", "128", "false")),
    ]
    append, decode = kernels
    assert append.chips == {"120": resources.Entry(40, 512, 16, 8)}
    assert decode.chips == {"80": resources.Entry(168, 0, 0, 0)}
    assert decode.instructions["80"] == {"all": 5, "HMMA": 1, "LDSM": 1, "LDGSTS": 1}
    text = resources.table(kernels, "nvcc 13.0.88")
    assert "| fp16, 128, false | 168 | – | 5 / 1 / 1 / 1 |" in text
    assert "| bf16 | – | 40 **+ 8 B**, 512 B shared | – |" in text
    assert resources.compiler_of(text) == "nvcc 13.0.88"


def test_check_finds_spills_and_an_old_table(tmp_path: Path) -> None:
    kernels = resources.collect(LOG, {})
    text, known = resources.table(kernels, "nvcc 13.0.88"), tmp_path / "resources.md"
    assert "not found" in resources.check(kernels, text, known)
    known.write_text(text)
    assert resources.check(kernels, text, known) is None
    known.write_text(text.replace("168", "160"))
    assert "other kernels" in resources.check(kernels, text, known)
    known.write_text(text.replace("168", "160").replace("13.0.88", "12.8.93"))
    assert resources.check(kernels, text, known) is None  # another compiler's numbers
    spilling = resources.collect(LOG.replace("0 bytes spill stores", "12 bytes spill stores"), {})
    assert "12 bytes" in resources.check(spilling, text, known)
