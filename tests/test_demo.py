"""What ``make demo`` shows, on the real model: the number is found far outside the window.

The same engine with as many heads chosen from the bottom of the ranking must miss it: otherwise the
text would be too easy to show anything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trt_razor.build import BuildRequest, build_engine
from trt_razor.generate import Generator, SamplingParams
from trt_razor.headmap import HeadMap
from trt_razor.policy import RazorPolicy

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "engines" / "recipes" / "smollm2-135m.heads.json"


def answer(folder: Path, heads: Path) -> str:
    engine = build_engine(
        BuildRequest(
            model="smollm2-135m",
            razor=True,
            heads=str(heads),
            backend="onnxruntime",
            output=folder / "engine",
            policy=RazorPolicy(min_window=256),
            max_seq_len=4096,
        )
    )
    tokenizer = engine.tokenizer()
    assert tokenizer is not None
    question = (ROOT / "docs" / "demo-prompt.txt").read_text()
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}]))
    needle = len(tokenizer.encode(question[: question.index("48213")]))
    policy = engine.manifest.policy
    assert policy is not None
    assert needle < policy.sink_tokens + policy.dropped(len(prompt))  # dropped by local heads
    generator = Generator(engine.open(), 0, tokenizer.eos_token_ids, tokenizer)
    return generator.run([prompt], SamplingParams(max_new_tokens=40))[0].text


def test_recipe_finds_the_number(tmp_path: Path) -> None:
    assert "48213" in answer(tmp_path, RECIPE)


def test_the_worst_heads_do_not(tmp_path: Path) -> None:
    recipe = HeadMap.load(RECIPE)
    score = sum(np.array(table) / np.max(table) for table in recipe.scores.values())
    worst = np.argsort(score, axis=None)[: recipe.num_retrieval]
    heads = [
        tuple(int(i) % recipe.num_kv_heads for i in sorted(worst) if i // recipe.num_kv_heads == n)
        for n in range(recipe.num_layers)
    ]
    path = tmp_path / "worst.json"
    replace(recipe, retrieval_heads=tuple(heads), method="worst").save(path)
    assert "48213" not in answer(tmp_path, path)
