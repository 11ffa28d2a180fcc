"""docs/ngc.md and docs/tensorrt-llm.md, taken apart for the tests of what they say."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_razor.errors import UsageError
from trt_razor.heads.selection import uniform_share
from trt_razor.models.zoo import zoo_spec
from trt_razor.policy import PRESETS, RazorPolicy
from trt_razor.trtllm.engine_config import RazorPlan, TrtLlmOptions, plan_engine, razor_section
from trt_razor.trtllm.ranks import equalise, rank_layout
from trt_razor.trtllm.release import release_of

ROOT = Path(__file__).resolve().parents[2]
NGC = (ROOT / "docs" / "ngc.md").read_text()
DESIGN = (ROOT / "docs" / "tensorrt-llm.md").read_text()
PROSE = " ".join(DESIGN.split())


def plan_of(
    model: str,
    tp_size: int = 1,
    max_seq_len: int = 32768,
    version: str = "1.0.0",
    policy: RazorPolicy = PRESETS["paper"],
    **options: object,
) -> RazorPlan:
    """15 % of the heads, evenly."""
    spec = zoo_spec(model)
    heads = equalise(uniform_share(spec, 0.15), tp_size)
    layout = rank_layout(heads, tp_size)
    return plan_engine(
        spec,
        razor_section(spec, heads, layout, policy),
        max_seq_len,
        "float16",
        TrtLlmOptions(tp_size=tp_size, **options),  # type: ignore[arg-type]
        release_of(version),
    )


def table(text: str, head: str) -> list[list[str]]:
    """Rows of the table whose first line begins with ``head``, cells stripped."""
    lines = text.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith(f"| {head}")]
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        rows.append([c.strip().replace("\\|", "|") for c in cells])
    return rows


def blocks(text: str) -> list[str]:
    """Indented code blocks."""
    found = re.findall(r"(?:^(?:    .*)?\n)*^    .*\n(?:(?:    .*)?\n)*", text, re.M)
    return [textwrap.dedent(block) for block in found]


def commands(text: str) -> list[list[str]]:
    """Words of every command line in code blocks, continuation lines joined."""
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if line.strip()]


def parser_of(*sections: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for add in sections:
        add(parser)
    return parser


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as e:
        call()
    return str(e.value)
