"""``README.md`` of a repository: how to start it, how to ask it, what its figures mean.

True for the one engine it lies beside: every number is that engine's. Commands are indented blocks,
each whole, so that tests can run them as they stand.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from trt_razor.headmap import HeadMap
from trt_razor.manifest import Manifest

README = "README.md"
WIDTH = 120


@dataclass(frozen=True)
class ReadmeFacts:
    """What a README says that the manifest does not.

    Attributes:
        head_map: of a Razor engine. engine: path of the engine for the server, or relative.
        tokenizer: whether the texts models are there. template: whether it has a chat template.
        prompt_format: the default. echo: whether answers begin with the prompt unless asked not to.
        rows: most rows of a request.
        queue: requests that may wait. slots, max_input, max_output: limits of own engines.
        decoupled: whether ``tensorrt_llm`` streams.
        world_size: GPUs of a TensorRT-LLM engine; 0 = an engine of our own.
        state_slots: a TensorRT-LLM engine whose local heads live in state slots.
        fraction, windows, sinks: cache settings of TensorRT-LLM; "" = left unset.
    """

    head_map: HeadMap | None
    engine: str
    tokenizer: bool
    template: bool
    prompt_format: str
    echo: bool
    rows: int
    queue: int
    slots: int = 0
    max_input: int = 0
    max_output: int = 0
    decoupled: bool = True
    world_size: int = 0
    state_slots: bool = False
    fraction: str = ""
    windows: str = ""
    sinks: str = ""


def readme(manifest: Manifest, facts: ReadmeFacts) -> str:
    """The text, Markdown."""
    own = facts.world_size == 0
    parts = [
        _title(manifest, facts),
        _start(facts),
        _ask(facts) if facts.tokenizer else _ask_ids(),
        _settings(manifest, facts),
        _figures(manifest) if own else _figures_trtllm(),
        _limits(manifest, facts),
    ]
    return "\n\n".join(_wrapped(part.strip("\n")) for part in parts if part) + "\n"


def _wrapped(text: str) -> str:
    """Paragraphs and points at a readable width; commands, tables and titles as they are."""
    out = []
    for block in text.split("\n\n"):
        if block.startswith("* "):
            points = block[2:].split("\n* ")
            block = "\n".join(_fill(f"* {point}", "  ") for point in points)
        elif not block.startswith(("    ", "|", "#")):
            block = _fill(block, "")
        out.append(block)
    return "\n\n".join(out)


def _fill(text: str, indent: str) -> str:
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _title(m: Manifest, facts: ReadmeFacts) -> str:
    kind = "dense attention"
    if m.heads is not None and facts.head_map is not None:
        total = facts.head_map.num_layers * facts.head_map.num_kv_heads
        kind = f"RazorAttention: {m.heads.retrieval_heads} of {total} KV heads keep every token"
    served = "Triton's `tensorrtllm` backend" if facts.world_size else "Triton's Python backend"
    lines = [
        f"# {m.spec.name} on Triton Inference Server",
        "",
        f"A model repository written by trt_razor {m.trt_razor}; its engine runs in {served}.",
        "",
        "| | |",
        "|---|---|",
        f"| engine | {_where(facts.engine)} ({m.backend}, {m.dtype}) |",
        f"| attention | {kind} |",
        f"| longest sequence, prompt and answer | {m.max_seq_len:,} tokens |",
    ]
    if facts.world_size:
        lines += _trtllm_bytes(m)
    else:
        lines += [
            f"| sequences at a time | {facts.slots} |",
            f"| KV cache | {facts.slots * m.kv_bytes_per_slot:,} bytes for {facts.slots} sequences of "
            f"{m.max_seq_len:,} tokens"
            + (f"; dense attention: {facts.slots * m.dense_kv_bytes_per_slot:,}" if m.razor else "")
            + " |",
        ]
    return "\n".join(lines)


def _where(engine: str) -> str:
    return f"`{engine}`" if engine.startswith("/") else f"`tensorrt_llm/{engine}`, a copy"


def _trtllm_bytes(m: Manifest) -> list[str]:
    facts = m.facts
    lines = [f"| sequences at a time | up to {m.max_batch_size}, as memory allows |"]
    razor = facts.get("kv_bytes_per_sequence_per_rank")
    dense = facts.get("dense_kv_bytes_per_sequence_per_rank")
    if razor and dense and razor.isdecimal() and dense.isdecimal():
        lines.append(
            f"| KV cache of a full sequence on each GPU | {int(razor):,} bytes; dense attention: "
            f"{int(dense):,} |"
        )
    return lines


def _start(facts: ReadmeFacts) -> str:
    if facts.world_size:
        return _start_trtllm(facts)
    return """
## Start

    bash start.sh

finds `tritonserver` (`$TRITONSERVER`, `/opt/tritonserver`, `PATH`, or the one inside the Python package `nvidia-pytriton`) and serves
HTTP on 127.0.0.1:8000, gRPC on 8001, metrics on 8002. `HTTP_PORT`, `GRPC_PORT`, `METRICS_PORT` and `ADDRESS` change that; nobody is
asked for a password, so leave the address alone or put something in front. Options go on to the server. The models run in the
`python3` of `PATH`, or `$TRT_RAZOR_TRITON_PYTHON`, which needs trt_razor; `start.sh` says what is missing. Stop it with Ctrl-C or
SIGTERM. When `curl -sf localhost:8000/v2/health/ready` succeeds, it is ready.
"""


def _start_trtllm(facts: ReadmeFacts) -> str:
    n = facts.world_size
    gpus = "1 GPU" if n == 1 else f"{n} GPUs, one for each rank"
    preload = (
        "It starts "
        + ("the server" if n == 1 else f"{n} servers")
        + " under `mpirun`"
        + (
            ", with our plugins preloaded"
            if facts.windows or facts.state_slots or facts.sinks
            else ""
        )
    )
    mpi = " `NO_MPI=1` starts it without." if n == 1 else ""
    return f"""
## Start

In an image `nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3` with trt_razor in it and the TensorRT-LLM that the engine was built
with, on {gpus}:

    ADDRESS=0.0.0.0 bash start.sh

{preload}, and serves HTTP on port 8000, gRPC on 8001, metrics on 8002 (`HTTP_PORT`, `GRPC_PORT`, `METRICS_PORT`). Without `ADDRESS` only
this machine, and in a container nobody outside of it, can ask. Nobody is asked for a password. `MPI_ARGS` goes to `mpirun`, options to
the servers.{mpi} When `curl -sf localhost:8000/v2/health/ready` succeeds, it is ready.
"""


def _ask(facts: ReadmeFacts) -> str:
    question = '"text_input": "Why is the sky blue?", '
    if not facts.template:
        question = '"text_input": "The sky is blue because", '
    elif facts.prompt_format != "chat":
        question += '"prompt_format": "chat", '
    examples = [("", "generate", question + '"max_tokens": 32')]
    if facts.decoupled:
        stream = question + '"max_tokens": 32, "stream": true'
        examples.append(("Piece by piece:", "generate_stream", stream))
    if facts.template:
        messages = r"[{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}]"
        talk = f'"text_input": "{messages}", "prompt_format": "messages", "max_tokens": 32'
        examples.append(("A conversation:", "generate", talk))
    text = "## Ask\n\n"
    for title, path, data in examples:
        curl = "curl -sN" if path == "generate_stream" else "curl -s"
        text += f"{title}\n\n" if title else ""
        text += (
            f"    {curl} localhost:8000/v2/models/ensemble/{path} \\\n        -d '{{{data}}}'\n\n"
        )
    if facts.template:
        text += (
            "`prompt_format` says what `text_input` is: `raw`, a text that goes to the model as it is; `chat`, one "
            "message of a user; `messages`, a JSON list of messages; the latter two are put into the model's chat "
            f"template. Default: `{facts.prompt_format}`. "
        )
    else:
        text += "The model has no chat template: `text_input` goes to it as it is. "
    text += "`text_output` " + ("begins with the prompt" if facts.echo else "is the answer alone")
    return (
        text
        + """ unless
`exclude_input_in_output` says otherwise. Without `top_k` or `top_p` the likeliest token is taken, whatever the temperature.
Further: `temperature`, `top_k`, `top_p`, `seed`, `stop_words`, `bad_words`, `min_tokens`, `repetition_penalty`,
`presence_penalty`, `frequency_penalty`, `return_log_probs`, `return_perf_metrics`. These are the names of NVIDIA's TensorRT-LLM
repository; what talks to that talks to this.

| model | |
|---|---|
| `ensemble` | text to text |
| `tensorrt_llm_bls` | the same, a few requests at once (`--bls-instances`); stops those of clients that leave |
| `tensorrt_llm` | ids to ids |
| `preprocessing`, `postprocessing` | text to ids, ids to text |
"""
    )


def _ask_ids() -> str:
    return """
## Ask

The engine's checkpoint had no tokenizer, so there is one model, `tensorrt_llm`, which takes ids and answers with ids:

    curl -s localhost:8000/v2/models/tensorrt_llm/generate \\
        -d '{"input_ids": [1, 2, 3], "input_lengths": 3, "request_output_len": 8}'
"""


def _settings(m: Manifest, facts: ReadmeFacts) -> str:
    if not facts.world_size:
        return """
## Settings

`slots`, `max_queue_size`, `max_input_tokens` and `max_output_tokens` in `tensorrt_llm/config.pbtxt` may be lowered, and the
queue raised; every slot costs its KV cache from the start. The rest is the engine's.
"""
    windows = facts.windows or "unset"
    sinks = facts.sinks or "unset"
    lines = [
        "## Settings",
        "",
        "In `tensorrt_llm/config.pbtxt`; from the engine, and not to be changed by hand:",
        "",
        "| | |",
        "|---|---|",
        f"| `max_attention_window_size` | {windows} |",
        f"| `sink_token_length` | {sinks} |",
        "| `enable_kv_cache_reuse` | false: a cached prefix has no compressed rows of its own |"
        if m.razor
        else "| `enable_kv_cache_reuse` | false |",
        f"| `enable_chunked_context` | {'true' if m.prefill_chunk else 'false'}: as the engine was built |",
        "",
        f"`kv_cache_free_gpu_mem_fraction` ({facts.fraction}) of the memory that is free after loading goes to KV pools.",
        "The engine is found by its absolute path (`gpt_model_path`): where that changes, write the repository again.",
    ]
    if facts.state_slots:
        lines.append(
            f"State slots of {m.max_batch_size} sequences are set aside before that, used or not."
        )
    return "\n".join(lines)


def _figures(m: Manifest) -> str:
    return """
## Figures

In every answer: `finish_reason` (`stop`, `length`, `capacity`: the sequence is full, `cancelled`; empty while it goes on),
`kv_cache_used_bytes` and `kv_cache_dense_bytes`: what the sequence keeps, and what dense attention would keep for the same tokens.

    curl -s localhost:8002/metrics | grep trt_razor_

`trt_razor_kv_cache_bytes_allocated` is set aside at the start; `trt_razor_kv_cache_bytes_used` is what sequences that run now fill.
`trt_razor_slots_active` of `trt_razor_slots_total` are at work, `trt_razor_queue_length` requests wait. Histograms, in seconds:
`trt_razor_time_to_first_token_seconds`, `trt_razor_inter_token_seconds`, `trt_razor_queue_seconds`, `trt_razor_request_seconds`.
"""


def _figures_trtllm() -> str:
    return """
## Figures

    curl -s localhost:8002/metrics | grep nv_trt_llm_

are the backend's own: requests by state, KV blocks used and free, tokens. Blocks of all windows are counted together, although those of
different windows differ in bytes.
"""


def _limits(m: Manifest, facts: ReadmeFacts) -> str:
    lines = ["## Limits", ""]
    if facts.world_size:
        lines += [
            f"* {m.max_seq_len:,} tokens of prompt and answer, {facts.rows} rows in a request, "
            f"{m.max_batch_size} sequences at a time.",
            "* No beam search, LoRA, prompt tuning, speculative decoding or reuse of cached prompts"
            + (" with Razor engines." if m.razor else "."),
        ]
        if not facts.decoupled:
            lines.append("* Answers come whole: the repository was written without streaming.")
        if facts.tokenizer:
            lines.append(
                "* A client that leaves `ensemble` does not stop its request; one of `tensorrt_llm_bls` or `tensorrt_llm` does."
            )
        return "\n".join(lines)
    lines += [
        f"* A prompt of {facts.max_input:,} tokens, an answer of {facts.max_output:,}, both together {m.max_seq_len:,} (then "
        "`capacity`); more is refused.",
        f"* {facts.slots} sequences at a time, {facts.queue} that wait; then requests are refused at once. {facts.rows} rows in a "
        "request.",
        "* Refused by name: beam search, several answers to one prompt, LoRA, prompt tuning, draft tokens, guided decoding, logits.",
        "* Without `seed` every answer of a sampled request is another one.",
    ]
    if facts.tokenizer:
        lines.append(
            "* A client that leaves `ensemble` does not stop its request, Triton does not tell; one of `tensorrt_llm_bls` or "
            "`tensorrt_llm` does."
        )
    lines.append(
        "* HTTP `infer` and unary gRPC do not work with models that stream: `generate`, `generate_stream`, gRPC streams."
    )
    return "\n".join(lines)
