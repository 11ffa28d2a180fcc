"""``preprocess_weights``: what loading does to the tensors of a rank file before a model gets them.

Read: FP8 bytes stored as int8, scalars to [1], reciprocals of KV scales, INT4-AWQ from rows of two
outputs [out / 2, in] to what the kernels take. The reordering for the GPU's generation, which follows
there, is left out; so is everything about other formats.
"""

from __future__ import annotations

from typing import Any

from tensorrt.errors import require


def preprocess_weights(weights: dict[str, Any], config: Any) -> dict[str, Any]:
    import torch

    quantization, dtype = config.quantization, getattr(torch, config.dtype)
    weights = dict(weights)
    for name, value in list(weights.items()):
        if name.endswith(("scaling_factor", "scaling_factor_2")) and value.ndim == 0:
            weights[name] = value = value.reshape(1)
        if name.endswith("kv_cache_scaling_factor"):
            inverse = name.replace("kv_cache_scaling_factor", "kv_cache_rcp_scaling_factor")
            weights.setdefault(inverse, torch.reciprocal(value))
        if (
            quantization.quant_algo == "FP8"
            and name.endswith("weight")
            and value.dtype == torch.int8
        ):
            weights[name] = value.view(torch.float8_e4m3fn)
        if quantization.quant_algo == "W4A16_AWQ" and value.dtype == torch.int8:
            packed = value.T.contiguous()  # [in, out / 2]
            weights[name] = packed.view(torch.float16)
            prefix = name.removesuffix("weight")
            scales = weights[prefix + "weights_scaling_factor"]
            require(
                scales.shape == (2 * value.shape[0], value.shape[1] // quantization.group_size),
                f"{prefix}weights_scaling_factor: {tuple(scales.shape)}",
            )
            weights[prefix + "weights_scaling_factor"] = scales.T.contiguous().to(dtype)
            name = prefix + "prequant_scaling_factor"
            weights[name] = weights[name].reshape(1, -1).to(dtype)
    return weights
