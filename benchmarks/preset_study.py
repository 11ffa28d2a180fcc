#!/usr/bin/env python3
"""What a small window needs: needle and KL of SmolLM2-135M under several policies.

Prompts are read once with full attention (one chunk: the paper's prefill). Their keys and values
are then compressed under every policy, so that all policies answer the same prompts. The question
comes after compression: nobody knows it when tokens are dropped.

    python benchmarks/preset_study.py --trials 12 --lengths 1024 2048

writes one JSON file and prints a table: the share of the dense model's right answers that stay
right (needle kept), and the mean KL divergence to the dense model over the 48 tokens that follow a
natural text. This is the quick study behind the ``tight`` preset, not the evaluation suite.
"""

from __future__ import annotations

import argparse
import json
import platform
import pydoc_data.topics
import random
import re
import sys
import time
from pathlib import Path

import torch

from trt_razor.files import write_text_atomic
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.planner import cache_bytes
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder

ROOT = Path(__file__).resolve().parent.parent
CITIES = [
    "Lisbon",
    "Oslo",
    "Quito",
    "Cairo",
    "Perth",
    "Hanoi",
    "Turin",
    "Dakar",
    "Lyon",
    "Minsk",
    "Accra",
    "Osaka",
]
FOLLOW = 48

POLICIES = {
    "window n/5, M = 1": RazorPolicy(min_window=64, compression=5, comp_tokens=1),
    "window 128, M = 0": RazorPolicy(min_window=128, compression=None, comp_tokens=0),
    "window 128, M = 1": RazorPolicy(min_window=128, compression=None, comp_tokens=1),
    "window 128, M = 16": RazorPolicy(min_window=128, compression=None, comp_tokens=16),
    "window 128, M = 32": RazorPolicy(min_window=128, compression=None, comp_tokens=32),
    "window 256, M = 32": RazorPolicy(min_window=256, compression=None, comp_tokens=32),
    "window 64, M = 32": RazorPolicy(min_window=64, compression=None, comp_tokens=32),
}


def filler() -> list[str]:
    """Sentences of English prose that every Python carries: its own language reference."""
    text = " ".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    text = re.sub(r"[*`|=~^\-]{2,}|\s+", " ", text)
    return [s.strip() + "." for s in text.split(". ") if 40 < len(s) < 300 and s[0].isupper()]


def prefill(decoder: ReferenceDecoder, tokens: list[int], n_max: int):
    """Dense caches of a prompt: every key and value of every head."""
    cache = decoder.new_cache(None, None, n_max)
    decoder.forward(torch.tensor(tokens), cache, last_only=True)
    return cache


def compress(decoder, dense, policy: RazorPolicy | None, head_map: HeadMap | None, n_max: int):
    """The same prompt under a policy; None = a copy of the dense cache."""
    caches = decoder.new_cache(policy, head_map, n_max)
    for new, old in zip(caches, dense, strict=True):
        k, v = old.full.full_k[:, : old.n], old.full.full_v[:, : old.n]
        for part, heads in ((new.full, new.retrieval_heads), (new.local, new.local_heads)):
            if part is not None:
                part.update(k[list(heads)], v[list(heads)])
        new.n = old.n
    return caches


def answer(decoder, caches, question: list[int], count: int) -> list[int]:
    logits = decoder.forward(torch.tensor(question), caches, last_only=True)
    out = []
    for _ in range(count):
        out.append(int(logits[-1].argmax()))
        logits = decoder.forward(torch.tensor(out[-1:]), caches, last_only=True)
    return out


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--trials", type=int, default=12)
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--heads", type=Path, default=ROOT / "engines/recipes/smollm2-135m.heads.json")
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/preset_study.json")
    args = p.parse_args()

    checkpoint = open_checkpoint("smollm2-135m", None)
    tokenizer, spec = checkpoint.tokenizer(), checkpoint.spec
    head_map = HeadMap.load(args.heads)
    decoder = ReferenceDecoder(checkpoint)
    sentences = filler()
    rows = []
    for length in args.lengths:
        n_max = length + 128
        right = {name: 0 for name in ["dense", *POLICIES]}
        kept = {name: 0 for name in POLICIES}
        kl = {name: [] for name in POLICIES}
        start = time.monotonic()
        for trial in range(args.trials):
            rng = random.Random(f"{args.seed} {length} {trial}")
            city, number = rng.choice(CITIES), str(rng.randrange(10000, 100000))
            body = "You read a document and answer a question about it.\n\n"
            hay, at, depth = rng.randrange(len(sentences)), 0, rng.uniform(0.05, 0.8)
            placed = False
            while at < length - 40:
                if not placed and at >= depth * length:
                    body += f"The magic number for {city} is {number}. "
                    placed = True
                body += sentences[hay % len(sentences)] + " "
                hay += 1
                at = len(tokenizer.encode(body))
            head = tokenizer.encode(f"<|im_start|>user\n{body}")[:length]
            question = tokenizer.encode(
                f"\n\nQuestion: What is the magic number for {city}?<|im_end|>\n"
                f"<|im_start|>assistant\nThe magic number for {city} is"
            )
            dense = prefill(decoder, head, n_max)

            def is_right(ids: list[int], number: str = number) -> bool:
                return number in tokenizer.decode(ids)

            dense_right = is_right(
                answer(decoder, compress(decoder, dense, None, None, n_max), question, 7)
            )
            right["dense"] += dense_right
            follow = tokenizer.encode(
                " ".join(sentences[(hay + i) % len(sentences)] for i in range(9))
            )
            follow_ids = torch.tensor(follow[:FOLLOW])
            want = decoder.forward(
                follow_ids, compress(decoder, dense, None, None, n_max)
            ).log_softmax(-1)
            for name, policy in POLICIES.items():
                ok = is_right(
                    answer(decoder, compress(decoder, dense, policy, head_map, n_max), question, 7)
                )
                right[name] += ok
                kept[name] += ok and dense_right
                caches = compress(decoder, dense, policy, head_map, n_max)
                got = decoder.forward(follow_ids, caches).log_softmax(-1)
                kl[name].append(float((want.exp() * (want - got)).sum(-1).mean()))
            left = (time.monotonic() - start) / (trial + 1) * (args.trials - trial - 1)
            print(f"{length}: {trial + 1}/{args.trials}, {left:.0f} s left", file=sys.stderr)
        full = cache_bytes(spec, None, None, length).total
        for name, policy in POLICIES.items():
            rows.append(
                {
                    "length": length,
                    "policy": name,
                    "settings": policy.to_json(),
                    "kv_kept": round(cache_bytes(spec, head_map, policy, length).total / full, 4),
                    "trials": args.trials,
                    "dense_right": right["dense"],
                    "right": right[name],
                    "kept": kept[name],
                    "kl": round(sum(kl[name]) / len(kl[name]), 5),
                }
            )
        print(f"\n{length} tokens, {args.trials} trials, dense right {right['dense']}")
        for r in rows:
            if r["length"] == length:
                print(
                    f"{r['policy']:20s} KV {r['kv_kept']:.3f}  kept {r['kept']:2d}/{right['dense']}  KL {r['kl']:.4f}"
                )
    result = {
        "machine": platform.processor() or platform.machine(),
        "seed": args.seed,
        "heads": head_map.method,
        "rows": rows,
    }
    write_text_atomic(args.output, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
