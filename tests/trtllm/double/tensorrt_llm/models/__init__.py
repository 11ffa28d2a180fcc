"""``MODEL_MAP``: model classes by the ``architecture`` of config.json (those of our families)."""

from .baichuan.config import BaichuanConfig
from .baichuan.model import BaichuanForCausalLM
from .llama.config import LLaMAConfig
from .llama.model import LLaMAForCausalLM
from .modeling_utils import PretrainedConfig, PretrainedModel
from .qwen.config import QWenConfig
from .qwen.model import QWenForCausalLM

MODEL_MAP = {
    "LlamaForCausalLM": LLaMAForCausalLM,
    "MistralForCausalLM": LLaMAForCausalLM,
    "MixtralForCausalLM": LLaMAForCausalLM,
    "QWenLMHeadModel": QWenForCausalLM,
    "QWenForCausalLM": QWenForCausalLM,
    "Qwen2ForCausalLM": QWenForCausalLM,
    "Qwen2MoeForCausalLM": QWenForCausalLM,
    "Qwen3ForCausalLM": QWenForCausalLM,
    "Qwen3MoeForCausalLM": QWenForCausalLM,
    "BaichuanForCausalLM": BaichuanForCausalLM,
    "BaiChuanForCausalLM": BaichuanForCausalLM,
}

__all__ = [
    "MODEL_MAP",
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "LLaMAConfig",
    "LLaMAForCausalLM",
    "PretrainedConfig",
    "PretrainedModel",
    "QWenConfig",
    "QWenForCausalLM",
]
