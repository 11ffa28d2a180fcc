"""Checks of the ``moe`` object of config.json: unknown keys are TypeErrors (read)."""

from __future__ import annotations

from typing import Any

_DEFAULTS: dict[str, Any] = {
    "num_experts": 0,
    "shared_expert_intermediate_size": 0,
    "top_k": 0,
    "normalization_mode": 0,
    "sparse_mixer_epsilon": 0.01,
    "tp_mode": 0,
    "device_limited_n_group": 0,
    "device_limited_topk_group": 0,
    "device_limited_routed_scaling_factor": 1.0,
}


def moe_dict(moe: dict[str, Any] | None) -> dict[str, Any]:
    unknown = set(moe or {}) - set(_DEFAULTS)
    if unknown:
        raise TypeError(f"MoeConfig.__init__() got an unexpected keyword argument {unknown}")
    return _DEFAULTS | (moe or {})
