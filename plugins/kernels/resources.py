#!/usr/bin/env python3
"""Registers, spills and instructions of every kernel, as a table.

    python plugins/kernels/resources.py build.log [--library librazor.so] [--output resources.md]

``build.log`` is the output of a build with ``-DRAZOR_RESOURCES=ON`` (``make resources`` does all of
this). Instruction counts need ``--library`` and cuobjdump. ``--check FILE`` writes nothing and fails
if a decode kernel spills, or if FILE was made by the same compiler from other kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

NO_SPILLS = "decode"  # kernels with this in their name must keep everything in registers
COUNTED = ("80", "90")  # chips whose instructions are counted
OPCODES = ("HMMA", "LDSM", "LDGSTS")

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_RELEASE = re.compile(r"CUDA (\d+\.\d+\.\d+)")
_SASS_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


@dataclass
class Entry:
    """What ptxas said of one kernel for one chip; bytes are per thread but for ``shared``."""

    registers: int
    shared: int
    stack: int
    spilled: int


@dataclass
class Kernel:
    name: str  # without namespaces and parameters
    arguments: tuple[str, ...]  # of the template
    chips: dict[str, Entry] = field(default_factory=dict)
    instructions: dict[str, dict[str, int]] = field(default_factory=dict)


def parse_log(text: str) -> dict[tuple[str, str], Entry]:
    """(mangled name, chip) -> Entry, from the output of ``ptxas -v``."""
    out: dict[tuple[str, str], Entry] = {}
    current: tuple[str, str] | None = None
    stack = spilled = 0
    for line in text.splitlines():
        if m := _ENTRY.search(line):
            current, stack, spilled = (m[1], m[2]), 0, 0
        elif current is None:
            continue
        elif m := _FRAME.search(line):  # of the kernel, and of functions it calls
            stack += int(m[1])
            spilled += max(int(m[2]), int(m[3]))
        elif m := _USED.search(line):
            shared = _SHARED.search(line)
            out[current] = Entry(int(m[1]), int(shared[1]) if shared else 0, stack, spilled)
            current = None
    return out


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled -> readable; c++filt comes with the host compiler."""
    if not shutil.which("c++filt"):
        raise SystemExit("error: c++filt: not found on PATH; it is part of binutils")
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernel_of(signature: str) -> Kernel:
    """``void razor::decode_kernel<__half, 128>(razor::Params, int*)`` -> its name and arguments."""
    text = re.sub(r"\(anonymous namespace\)::", "", signature)
    text = re.sub(r"\((?:int|bool|unsigned int|razor::\w+)\)", "", text)  # (int)128 -> 128
    text = re.sub(r"^void ", "", text)
    depth, end = 0, len(text)
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    text = text[:end]
    name, _, rest = text.partition("<")
    readable = {
        "__half": "fp16",
        "__nv_bfloat16": "bf16",
        "unsigned char": "fp8",
        "__nv_fp8_e4m3": "fp8",
    }
    arguments, part, depth = [], "", 0
    for c in rest[:-1] if rest else "":
        depth += (c == "<") - (c == ">")
        if c == "," and depth == 0:
            arguments.append(part)
            part = ""
        else:
            part += c
    if part:
        arguments.append(part)
    clean = [re.sub(r"\brazor::", "", a).strip() for a in arguments]
    return Kernel(name.split("::")[-1], tuple(readable.get(a, a) for a in clean))


def count_instructions(text: str) -> dict[str, dict[str, int]]:
    """Mangled name -> counts, from ``cuobjdump -sass`` of one chip. Padding is not counted."""
    out: dict[str, dict[str, int]] = {}
    counts: dict[str, int] | None = None
    for line in text.splitlines():
        if m := _SASS_FUNCTION.match(line):
            counts = out[m[1]] = dict.fromkeys(("all", *OPCODES), 0)
        elif counts is not None and (m := _SASS_LINE.match(line)):
            if m[1] == "NOP":
                continue
            counts["all"] += 1
            if m[1] in counts:
                counts[m[1]] += 1
    return out


def dump_sass(library: Path, chip: str) -> str:
    done = subprocess.run(
        ["cuobjdump", "-sass", "-arch", f"sm_{chip}", str(library)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"error: cuobjdump {library}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]


def collect(log: str, sass: dict[str, str]) -> list[Kernel]:
    """All kernels of a build, in the order of the table."""
    entries = parse_log(log)
    names = demangle(sorted({name for name, _ in entries}))
    kernels: dict[str, Kernel] = {}
    for (mangled, chip), entry in entries.items():
        kernel = kernels.setdefault(mangled, kernel_of(names[mangled]))
        kernel.chips[chip] = entry
    for chip, text in sass.items():
        for mangled, counts in count_instructions(text).items():
            if mangled in kernels:
                kernels[mangled].instructions[chip] = counts
    return sorted(kernels.values(), key=lambda k: (k.name, [_natural(a) for a in k.arguments]))


def table(kernels: list[Kernel], compiler: str) -> str:
    """Markdown: a section per kernel, a row per instantiation."""
    chips = sorted({c for k in kernels for c in k.chips}, key=_natural)
    spilling = [
        f"`{k.name}<{', '.join(k.arguments)}>` on sm_{c}"
        for k in kernels
        for c, e in k.chips.items()
        if e.spilled
    ]
    total = sum(len(k.chips) for k in kernels)
    lines = [
        "# Registers, spills, instructions",
        "",
        f"Compiler: {compiler}. Made by `make resources` from ptxas's report and, for the instructions, cuobjdump.",
        "",
        f"{len(kernels)} kernels, {total} with every chip counted; {len(spilling)} of them spill"
        + (
            ": " + "; ".join(spilling[:12]) + ("; …" if len(spilling) > 12 else "")
            if spilling
            else ""
        )
        + ".",
        "",
        "Registers are per thread, by chip (`sm_…`); `+ n B` are bytes that a thread spills, `stack n` bytes of local arrays.",
        "Shared memory is dynamic and chosen at launch; where a kernel has static shared memory, it is named. Instructions",
        "are those in the code, not those executed: all / matrix products (HMMA) / matrix loads (LDSM) / async copies (LDGSTS).",
    ]
    counted = [c for c in COUNTED if any(c in k.instructions for k in kernels)]
    for name in dict.fromkeys(k.name for k in kernels):
        rows = [k for k in kernels if k.name == name]
        head = [
            "instantiation",
            *(f"sm_{c}" for c in chips),
            *(f"instructions sm_{c}" for c in counted),
        ]
        lines += ["", f"## {name}", "", "| " + " | ".join(head) + " |"]
        lines += ["|---" * len(head) + "|"]
        for k in rows:
            cells = [", ".join(k.arguments) or "–"]
            cells += [_cell(k.chips.get(c)) for c in chips]
            for c in counted:
                counts = k.instructions.get(c)
                cells.append(
                    " / ".join(f"{counts[o]:,}" for o in ("all", *OPCODES)) if counts else "–"
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    text = str(entry.registers)
    if entry.spilled:
        text += f" **+ {entry.spilled} B**"
    elif entry.stack:
        text += f" stack {entry.stack}"
    if entry.shared:
        text += f", {entry.shared} B shared"
    return text


def compiler_of(text: str) -> str:
    """What the table's third line names."""
    m = re.search(r"^Compiler: (.*?)\. Made by", text, re.MULTILINE)
    return m[1] if m else "unknown"


def check(kernels: list[Kernel], text: str, known: Path) -> str | None:
    """What is wrong, or None."""
    for k in kernels:
        for chip, entry in k.chips.items():
            if NO_SPILLS in k.name and entry.spilled:
                return (
                    f"{k.name}<{', '.join(k.arguments)}> on sm_{chip}: expected no spills, found "
                    f"{entry.spilled} bytes; give it fewer registers' worth of work"
                )
    if not known.is_file():
        return f"{known}: not found; run make resources and add it"
    old = known.read_text(encoding="utf-8")
    if compiler_of(old) == compiler_of(text) and old != text:
        return f"{known}: is of other kernels than these; run make resources and add it"
    return None


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("log", type=Path)
    p.add_argument("--library", type=Path, help="librazor.so of the same build")
    p.add_argument("--nvcc", default="", help="version to name; default: the log's own line")
    p.add_argument("--output", type=Path, help="default: print")
    p.add_argument("--check", type=Path, metavar="FILE")
    args = p.parse_args()
    log = args.log.read_text(encoding="utf-8", errors="replace")
    sass: dict[str, str] = {}
    if args.library:
        if not shutil.which("cuobjdump"):
            raise SystemExit(
                "error: cuobjdump: not found on PATH; leave out --library to do without"
            )
        built = {chip for _, chip in parse_log(log)}
        sass = {chip: dump_sass(args.library, chip) for chip in COUNTED if chip in built}
    kernels = collect(log, sass)
    if not kernels:
        raise SystemExit(f"error: {args.log}: no report of ptxas; build with -DRAZOR_RESOURCES=ON")
    version = args.nvcc or (m[1] if (m := _RELEASE.search(log)) else "unknown")
    text = table(kernels, f"nvcc {version}")
    if args.check:
        problem = check(kernels, text, args.check)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
        print(f"{args.check}: {len(kernels)} kernels, no spills in decode")
    elif args.output:
        _write(args.output, text)
        print(f"wrote {args.output}: {len(kernels)} kernels")
    else:
        sys.stdout.write(text)
    return 0


def _write(path: Path, text: str) -> None:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(fd, "w", encoding="utf-8") as f:
        f.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)


if __name__ == "__main__":
    raise SystemExit(main())
