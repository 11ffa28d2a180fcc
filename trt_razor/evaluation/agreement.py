"""Whether an engine says what the Hugging Face path says: greedy tokens, step by step.

Both get the same head map, policy and chunks of the prompt. The Hugging Face path decodes greedily;
the engine is given its tokens (*teacher forced*) and is asked at each step which one it would have
taken, so that one difference does not make all later steps differ. It also decodes by itself
(*free*).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.evaluation.runners.engine import EngineRunner, EngineSession
from trt_razor.evaluation.text import load_text
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.policy import RazorPolicy


@dataclass(frozen=True)
class Difference:
    """A step at which the engine would have taken another token.

    Attributes:
        prompt, step: where, from 0.
        expected, found: token of the Hugging Face path and of the engine.
        margin: how much the Hugging Face path prefers its own, in logits; rounding decides if it is
            not above ``error``.
        error: largest difference between the two paths' logits at this step.
    """

    prompt: int
    step: int
    expected: int
    found: int
    margin: float
    error: float


@dataclass(frozen=True)
class Agreement:
    """Result of a comparison.

    Attributes:
        engine, model: labels.
        prompt_tokens: length of each prompt.
        steps, equal: greedy steps, and those with the same token, teacher forced.
        free_equal: tokens that are the same at the same place when the engine decodes by itself.
        largest_error: largest difference of logits at any step.
        smallest_margin: smallest distance of the two best logits of the Hugging Face path.
        differences: the steps that differ.
    """

    engine: str
    model: str
    prompt_tokens: tuple[int, ...]
    steps: int
    equal: int
    free_equal: int
    largest_error: float
    smallest_margin: float
    differences: tuple[Difference, ...]

    @property
    def share(self) -> float:
        """Share of equal greedy steps, teacher forced."""
        return self.equal / self.steps

    @property
    def free_share(self) -> float:
        """Share of equal tokens when the engine decodes by itself."""
        return self.free_equal / self.steps

    def to_json(self) -> dict[str, Any]:
        """JSON values, shares included."""
        return {**asdict(self), "share": self.share, "free_share": self.free_share}

    def markdown(self) -> str:
        """A table, and a line for each step that differs."""
        lines = [
            "| engine | model | prompts | tokens | steps | equal | equal, free running | largest "
            "error of a logit |",
            "|---|---|---|---|---|---|---|---|",
            f"| {self.engine} | {self.model} | {len(self.prompt_tokens)} | "
            f"{min(self.prompt_tokens)} – {max(self.prompt_tokens)} | {self.steps} | "
            f"{self.share:.2%} | {self.free_share:.2%} | {self.largest_error:.1e} |",
        ]
        if self.differences:
            lines.append("")
        for d in self.differences:
            lines.append(
                f"* prompt {d.prompt}, step {d.step}: expected {d.expected}, found {d.found}; margin "
                f"{d.margin:.1e}, error {d.error:.1e}"
            )
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class AgreementOptions:
    """What ``measure`` compares.

    Attributes:
        engine: its directory.
        model, checkpoint: a zoo name, or a file or folder with the weights it was built from; the
            engine's model by its name if neither is given.
        text, part: where prompts come from (``evaluation.text``).
        prompts, prompt_tokens, new_tokens: how many, and how long.
        seed: of the places in the text.
    """

    engine: Path
    model: str | None = None
    checkpoint: Path | None = None
    text: str = "python"
    part: str = "test"
    prompts: int = 4
    prompt_tokens: int = 600
    new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: expected a number >= 1, found {value!r}")


def measure(
    options: AgreementOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> Agreement:
    """Compare an engine with the model it was built from, on pieces of a text.

    Args:
        progress: called with (prompts done, prompts in all).

    Raises:
        UsageError: the engine was built from other weights, is too short for the prompts, or the
            text is. MissingExtra: transformers.
    """
    from trt_razor.reference.hf.load import checkpoint_model

    runner = EngineRunner(Path(options.engine).expanduser())
    named = options.model
    if named is None and options.checkpoint is None:
        named = runner.engine.manifest.spec.name  # the zoo's weights, if it has them
    checkpoint = open_checkpoint(named, options.checkpoint)
    if checkpoint.identity() != runner.engine.manifest.checkpoint:
        raise UsageError(
            f"{options.engine}: built from other weights than {checkpoint.location}; name those it "
            f"was built from"
        )
    prompts = text_prompts(runner, options)
    model = checkpoint_model(checkpoint)
    return compare(runner, model, prompts, options.new_tokens, checkpoint.spec.name, progress)


def text_prompts(runner: EngineRunner, options: AgreementOptions) -> list[list[int]]:
    """Pieces of a text, from places that the seed chooses."""
    text = load_text(options.text, options.part)
    rng = random.Random(f"agreement/{options.seed}")
    out = []
    for _ in range(options.prompts):
        ids: list[int] = []
        start = rng.randrange(len(text.sentences))
        for sentence in (*text.sentences[start:], *text.sentences[:start]):
            ids += runner.tokenizer.encode(f" {sentence}", parse_special=False)
            if len(ids) >= options.prompt_tokens:
                break
        else:
            raise UsageError(
                f"text '{options.text}': {len(ids)} tokens, expected {options.prompt_tokens}"
            )
        out.append(ids[: options.prompt_tokens])
    return out


def compare(
    runner: EngineRunner,
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    name: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Greedy tokens of an engine against those of a transformers model with the same Razor settings.

    Args:
        model: of transformers, with the weights of the engine; Razor must not be switched on.
        prompts: token ids.
        new_tokens: greedy steps after each prompt.
        name: label of the model.

    Raises:
        UsageError: a prompt that does not fit the engine with its new tokens.
    """
    from trt_razor.reference import hf

    manifest = runner.engine.manifest
    limit = runner.session.max_seq_len
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) < 1 or longest + new_tokens > limit + 1:
        raise UsageError(
            f"prompts: expected at least one, each of 1 to {limit + 1 - new_tokens} tokens "
            f"(max_seq_len {limit}, {new_tokens} new ones), found {[len(p) for p in prompts]}"
        )
    equal = free_equal = 0
    errors, margins, differences = [], [], []
    with hf.enable(model, runner.engine.head_map, manifest.policy or RazorPolicy()) as razor:
        for i, prompt in enumerate(prompts):
            wanted = _hf_greedy(model, razor, prompt, runner.max_chunk, new_tokens)
            context = runner.read(prompt[:-1])
            forced = context.compress()
            found = _forced(forced, [prompt[-1], *(int(x.argmax()) for x in wanted[:-1])])
            mine: list[Difference] = []
            for step, (a, b) in enumerate(zip(wanted, found, strict=True)):
                expected, got = int(a.argmax()), int(b.argmax())
                best = np.partition(a, -2)[-2:]
                errors.append(float(np.abs(a - b).max()))
                margins.append(float(best[1] - best[0]))
                if expected != got:
                    margin = float(a[expected] - a[got])
                    mine.append(Difference(i, step, expected, got, margin, errors[-1]))
            equal += new_tokens - len(mine)
            # Without a difference the engine would have taken the same way by itself.
            free_equal += new_tokens
            if mine:
                tokens = [int(x.argmax()) for x in wanted]
                alone = _free(context.compress(), prompt[-1], new_tokens)
                free_equal -= sum(a != b for a, b in zip(tokens, alone, strict=True))
            differences += mine
            progress(i + 1, len(prompts))
    return Agreement(
        runner.label,
        name,
        tuple(map(len, prompts)),
        new_tokens * len(prompts),
        equal,
        free_equal,
        max(errors),
        min(margins),
        tuple(differences),
    )


def _hf_greedy(
    model: Any, razor: Any, prompt: Sequence[int], chunk: int, new_tokens: int
) -> list[np.ndarray]:
    """Logits [vocab] float32 of each greedy step: the prompt in chunks, then token by token.

    The engine runner reads all but the last token of a prompt as context; so does this.
    """
    import torch

    cache = razor.new_cache(len(prompt) + new_tokens)

    def run(tokens: Sequence[int]) -> np.ndarray:
        ids = torch.tensor([list(tokens)], device=model.device)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: np.ndarray = out.logits[0, -1].float().cpu().numpy()
        return logits

    with torch.inference_mode():
        for start in range(0, len(prompt) - 1, chunk):
            run(prompt[start : min(start + chunk, len(prompt) - 1)])
        steps = [run(prompt[-1:])]
        while len(steps) < new_tokens:
            steps.append(run([int(steps[-1].argmax())]))
    return steps


def _forced(session: EngineSession, tokens: Sequence[int]) -> list[np.ndarray]:
    return [session.feed([token])[-1] for token in tokens]


def _free(session: EngineSession, token: int, new_tokens: int) -> list[int]:
    out: list[int] = []
    for _ in range(new_tokens):
        token = int(session.feed([token])[-1].argmax())
        out.append(token)
    return out
