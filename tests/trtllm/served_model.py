"""An engine that was built on the double, served: all its ranks, layer by layer, on the CPU.

Everything comes from what a build leaves behind and TensorRT-LLM would read: config.json (parsed as the
runtime parses it) says which cache layers, windows and slots there are; each rank's recorded network
says which plugin a layer has, with which fields and which inputs; the weights are those of the rank
files of the converted checkpoint, computed with as TensorRT-LLM's layers do. Attention is the real
plugin, on the emulated cache manager's tables. Nothing of ``trt_razor.trtllm`` is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cache_manager import CacheConfig, CacheManager, OffsetTable, blocks_of_memory
from doubles import network
from drivers import rebuild
from fake_host import BUILD, FieldValue, Host, Plugin, Tensor
from in_flight import Batch, InFlightBatching, Request
from razor_memory import Buffer
from runtime_config import ModelConfig, parse
from safetensors.torch import load_file
from torch import Tensor as TorchTensor

PLUGIN = "RazorGptAttention"


def cache_config(config: ModelConfig, linear: bool) -> CacheConfig:
    """The cache manager that the runtime makes for an engine whose server sets nothing."""
    assert config.max_num_tokens is not None
    longest = config.max_seq_len - 1
    if not config.chunked_context():
        longest = min(longest, config.max_num_tokens)
    element = {"fp8": 1, "float16": 2, "bfloat16": 2}[config.kv_dtype]
    return CacheConfig(
        heads=config.local_kv_heads(),
        head_dim=config.head_size,
        element_bytes=element,
        tokens_per_block=config.tokens_per_block,
        max_seq_len=config.max_seq_len,
        max_num_sequences=config.max_batch_size,
        windows=tuple(config.windows()),
        sink_tokens=config.default_sinks or 0,
        linear=linear,
        paged_context=config.paged_context_fmha,
        max_num_tokens=config.max_num_tokens,
        max_input_len=longest,
    )


class Rank:
    """One rank: its weights, its plugins, its memory."""

    def __init__(
        self, host: Host, engine: Path, checkpoint: Path, rank: int, manager: CacheManager
    ) -> None:
        self.host, self.manager = host, manager
        self.config = parse((engine / "config.json").read_text())
        self.weights = {
            name: value.float()
            for name, value in load_file(checkpoint / f"rank{rank}.safetensors").items()
        }
        recorded = network(engine / f"rank{rank}.engine")
        self.recorded: list[dict[str, Any]] = recorded["plugins"]
        self.plugins = [self._plugin(layer) for layer in self.recorded]
        self.pools = [Buffer(f"pool {i}", p.nbytes) for i, p in enumerate(manager.pools)]
        self.states: dict[str, Buffer] = {}
        if self.config.rnn_based:
            conv, rnn = self.config.state_shapes(self.config.max_batch_size)
            for names in self.config.state_inputs():
                for name, shape, size in zip(names, (conv, rnn), (2, 4), strict=True):
                    self.states[name] = Buffer(name, math.prod(shape[1:]) * size)
        # The runtime refuses inputs that it does not know, at the first step.
        known = {*_per_call({}, None), *self._static(), *self.states, *_OTHER_INPUTS}
        assert set(recorded["inputs"]) <= known, set(recorded["inputs"]) - known

    def _plugin(self, recorded: Mapping[str, Any]) -> Plugin:
        fields: dict[str, FieldValue] = {
            name: np.array([value], np.int64) if name.endswith("slot_bytes") else value
            for name, value in recorded["fields"].items()
        }
        made = self.host.create(PLUGIN, fields, BUILD, recorded["name"])
        assert made is not None, self.host.log()
        return rebuild(made, PLUGIN)

    def _static(self) -> dict[str, np.ndarray]:
        """Inputs that are the same in every step."""
        manager, config = self.manager, self.manager.config
        return {
            "host_max_attention_window_sizes": manager.window_sizes(),
            "host_sink_token_length": np.array([config.sink_tokens], np.int32),
            "host_kv_cache_pool_pointers": manager.pool_pointers([p.pointer for p in self.pools]),
            "host_kv_cache_pool_mapping": manager.pool_mapping(),
            "host_context_progress": np.zeros(1, np.int64),
            "host_runtime_perf_knobs": np.array([1, 0, *[-1] * 14], np.int64),
            "cache_indirection": np.zeros(
                (config.max_num_sequences, 1, config.max_seq_len), np.int32
            ),
        }

    def attention(
        self, layer: int, qkv: TorchTensor, arrays: Mapping[str, np.ndarray]
    ) -> TorchTensor:
        """Rows [tokens, Hq · D] of a layer for rows of q, k and v."""
        fields, inputs = self.recorded[layer]["fields"], []
        half = qkv.half().contiguous()
        values = {
            **self._static(),
            **arrays,
            **{n: np.array([b.pointer], np.int64) for n, b in self.states.items()},
        }
        kept = []
        for i, wanted in enumerate(self.recorded[layer]["inputs"]):
            name = wanted["name"]
            value = half.view(torch.int16).numpy() if i == 0 else values.get(name)
            if value is None and "values" in wanted:
                value = np.array(wanted["values"], np.float32)
            if value is None and name.endswith("embed_positions_for_gpt_attention"):
                value = self._rotary_table(layer)
            if value is None:
                value = self.weights[name].numpy()
            value = value.reshape([v if d < 0 else d for d, v in _dims(wanted["shape"], value)])
            buffer = Buffer(name, value.nbytes, value)
            kept.append(buffer)
            inputs.append(Tensor(wanted["dtype"], list(value.shape), buffer.pointer))
        out = Buffer("out", len(half) * fields["num_heads"] * fields["head_dim"] * 2)
        outputs = [
            Tensor("float16", [len(half), fields["num_heads"] * fields["head_dim"]], out.pointer)
        ]
        plugin = self.plugins[layer]
        workspace = Buffer("workspace", 1 << 22)
        assert plugin.shape_change(inputs, outputs), self.host.log()
        done = plugin.enqueue(inputs, outputs, workspace.pointer)
        log = self.host.log()
        assert done, log
        assert log == ""
        for buffer in (out, workspace, *self.pools, *self.states.values()):
            buffer.check_guards()
        return out.tensor(torch.float16).view(len(half), -1).float()

    def _rotary_table(self, layer: int) -> np.ndarray:
        """(cos, sin) pairs, from the frequencies that the network was built with."""
        recorded = self.recorded[layer]["inputs"]
        frequencies = next(i["values"] for i in recorded if i["name"].endswith("rotary_inv_freq"))
        size = next(i["shape"] for i in recorded if i["name"].endswith("for_gpt_attention"))[-1]
        angles = np.outer(np.arange(size // (2 * len(frequencies))), frequencies)
        return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32).reshape(1, -1)


_OTHER_INPUTS = ("input_ids", "position_ids", "last_token_ids", "all_reduce_workspace")


def _dims(shape: Sequence[int], value: np.ndarray) -> list[tuple[int, int]]:
    """Dimensions as recorded, beside those of a value."""
    if len(shape) == value.ndim:
        return list(zip(shape, value.shape, strict=True))
    assert -1 not in shape, shape
    return [(d, d) for d in shape]


def _per_call(arrays: Mapping[str, Any], tables: tuple[Any, Any] | None) -> dict[str, Any]:
    """Inputs of a call by name."""
    names = (
        "sequence_length",
        "host_past_key_value_lengths",
        "context_lengths",
        "host_request_types",
        "slot_mapping",
        "host_context_lengths",
    )
    out = {name: arrays.get(name) for name in names}
    host, device = tables or (None, None)
    return {**out, "host_kv_cache_block_offsets": host, "kv_cache_block_offsets": device}


class ServedModel:
    """All ranks of a model of the llama family, with the arithmetic of TensorRT-LLM's layers.

    Args:
        engine, checkpoint: folders that a build and a conversion left.
        linear: the cache manager of 1.1 or later.
    """

    def __init__(self, host: Host, engine: Path, checkpoint: Path, linear: bool) -> None:
        config = parse((engine / "config.json").read_text())
        config.check_in_flight()
        pretrained = json.loads((checkpoint / "config.json").read_text())
        self.config, self.eps = config, pretrained["norm_epsilon"]
        self.layers = pretrained["num_hidden_layers"]
        self.qk_norm = pretrained.get("qwen_type") == "qwen3"
        cache = cache_config(config, linear)
        memory = 3 * sum(cache.token_bytes(w) * w for w in cache.distinct_windows())
        self.ranks = []
        for rank in range(config.tp_size):
            manager = CacheManager(cache, blocks_of_memory(cache, memory))
            self.ranks.append(Rank(host, engine, checkpoint, rank, manager))
        self.manager = self.ranks[0].manager
        for rank in self.ranks:
            rank.manager = self.manager  # every rank has the same tables
        fused = not config.rnn_based
        chunked = config.chunked_context()
        self.batching = InFlightBatching(self.manager, config.max_batch_size, False, chunked, fused)
        self.tables = {kind: OffsetTable(self.manager) for kind in (True, False)}

    def serve(
        self, requests: Sequence[Request], tokens: Mapping[int, TorchTensor]
    ) -> list[tuple[Batch, TorchTensor]]:
        """Run all requests, two of which arrive in each step; every call with its logits [tokens, vocab].

        Args:
            tokens: ids of each request, prompt and what it "generates".
        """
        done = []
        arrivals = iter([list(requests[i : i + 2]) for i in range(0, len(requests), 2)])
        for batches in self.batching.run(arrivals):
            done += [(batch, self._forward(batch, tokens)) for batch in batches]
        return done

    @torch.no_grad()
    def _forward(self, batch: Batch, tokens: Mapping[int, TorchTensor]) -> TorchTensor:
        table = self.tables[self.batching.fused or batch.parts[0].context]
        host, device = table.fill([part.sequence for part in batch.parts])
        arrays = _per_call(batch.arrays(), (host.copy(), device.copy()))
        ids = torch.cat([tokens[p.sequence][p.begin : p.total] for p in batch.parts])
        x = self.ranks[0].weights["transformer.vocab_embedding.weight"][ids]
        for layer in range(self.layers):
            name = f"transformer.layers.{layer}."
            normed = self._norm(x, f"{name}input_layernorm.weight")
            x = x + self._sum(
                lambda rank, normed=normed, name=name, layer=layer: self._attention(  # type: ignore[misc]
                    rank, layer, name + "attention.", normed, arrays
                )
            )
            bias = self.ranks[0].weights.get(f"{name}attention.dense.bias")
            x = x if bias is None else x + bias
            normed = self._norm(x, f"{name}post_layernorm.weight")
            x = x + self._sum(
                lambda rank, normed=normed, name=name: self._mlp(rank, name + "mlp.", normed)  # type: ignore[misc]
            )
        x = self._norm(x, "transformer.ln_f.weight")
        logits = torch.cat([x @ rank.weights["lm_head.weight"].T for rank in self.ranks], 1)
        return logits[:, : self.config.vocab_size]

    def _sum(self, part: Callable[[Rank], TorchTensor]) -> TorchTensor:
        """The all-reduce behind a row-parallel projection."""
        return torch.stack([part(rank) for rank in self.ranks]).sum(0)

    def _norm(self, x: TorchTensor, name: str) -> TorchTensor:
        return F.rms_norm(x, x.shape[-1:], self.ranks[0].weights[name], self.eps)

    def _attention(
        self, rank: Rank, layer: int, name: str, x: TorchTensor, arrays: Mapping[str, Any]
    ) -> TorchTensor:
        w = rank.weights
        qkv = F.linear(x, w[name + "qkv.weight"], w.get(name + "qkv.bias"))
        if self.qk_norm:
            heads = qkv.unflatten(-1, (-1, self.config.head_size))
            kv = self.config.kv_heads and rank.recorded[layer]["fields"]["num_kv_heads"]
            q, k, v = heads.split([heads.shape[1] - 2 * kv, kv, kv], 1)
            q, k = (
                F.rms_norm(t, t.shape[-1:], w[f"{name}{n}_layernorm.weight"], self.eps)
                for t, n in ((q, "q"), (k, "k"))
            )
            qkv = torch.cat([q, k, v], 1).flatten(1)
        return rank.attention(layer, qkv, arrays) @ w[name + "dense.weight"].T

    def _mlp(self, rank: Rank, name: str, x: TorchTensor) -> TorchTensor:
        w = rank.weights
        gate = F.silu(x @ w[name + "fc.weight"].T) * (x @ w[name + "gate.weight"].T)
        return gate @ w[name + "proj.weight"].T
