"""``Mapping``: ranks of tensor and pipeline parallelism.

Read: rank = pp_rank * tp_size + tp_rank (cp = 1), the check of world_size, ``pp_layers`` as
torch.tensor_split (first stages get the extra layers), unknown keys are TypeErrors. Which release
knows ``enable_lm_head_tp_in_adp`` and ``moe_cluster_size`` was read from neighbours of 1.1.
"""

from __future__ import annotations

from typing import Any

from ._release import RELEASE

_DEFAULTS: dict[str, Any] = {
    "cp_size": 1,
    "cp_config": None,
    "tp_size": 1,
    "pp_size": 1,
    "moe_tp_size": -1,
    "moe_ep_size": -1,
    "attn_tp_size": -1,
    "attn_cp_size": -1,
    "enable_attention_dp": False,
}
if RELEASE >= (1, 1):
    _DEFAULTS |= {"moe_cluster_size": -1, "enable_lm_head_tp_in_adp": False}


class Mapping:
    def __init__(
        self, world_size: int = 1, rank: int = 0, gpus_per_node: int = 8, **sizes: Any
    ) -> None:
        unknown = set(sizes) - set(_DEFAULTS)
        if unknown:
            raise TypeError(f"Mapping.__init__() got an unexpected keyword argument {unknown}")
        for name, default in _DEFAULTS.items():
            setattr(self, name, sizes.get(name, default))
        self.cp_config = self.cp_config or {}
        for name in ("moe_tp_size", "moe_ep_size"):
            setattr(self, name, abs(getattr(self, name)))
        self.world_size, self.gpus_per_node = world_size, gpus_per_node
        self.rank = rank
        ranks = self.tp_size * self.pp_size * self.cp_size
        if world_size != ranks:
            raise ValueError(f"world_size {world_size} for {ranks} ranks of tp, pp and cp")

    @property
    def rank(self) -> int:
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        if not isinstance(rank, int) or not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of {self.world_size}")
        self._rank = rank
        self.tp_rank = rank % self.tp_size
        self.pp_rank = rank // self.tp_size
        self.cp_rank = 0
        first = self.pp_rank * self.tp_size
        self.tp_group = list(range(first, first + self.tp_size))
        self.pp_group = list(range(self.tp_rank, self.world_size, self.tp_size))
        self.cp_group = [rank]

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def prev_pp_rank(self) -> int:
        return (self.rank - self.tp_size) % self.world_size

    def next_pp_rank(self) -> int:
        return (self.rank + self.tp_size) % self.world_size

    def pp_layers(self, num_layers: int) -> list[int]:
        share, more = divmod(num_layers, self.pp_size)
        first = self.pp_rank * share + min(self.pp_rank, more)
        return list(range(first, first + share + (self.pp_rank < more)))

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Mapping:
        return cls(**mapping)

    def to_dict(self) -> dict[str, Any]:
        names = ["world_size", "rank", "gpus_per_node", *_DEFAULTS]
        return {name: getattr(self, name) for name in names}
