"""SDAR with mixtures of experts (JetAstra `modeling_sdar_moe.py`): Qwen3-MoE that sees both ways within a block."""

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from server.models.decoder import Attention, GatedMLP, Layer
from server.models.experts import highest, mix
from server.models.layers import RMSNorm
from server.models.sdar import SDAR, SDARConfig


class SDARMoEConfig(SDARConfig):
    """`config.json` of such a checkpoint."""

    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(1, gt=0)
    mlp_only_layers: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _no_list_is_an_empty_one(cls, data: Any) -> Any:
        return {**data, "mlp_only_layers": ()} if isinstance(data, dict) and not data.get("mlp_only_layers") else data

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = {self.num_experts}"
            )
        return self

    def mixed(self, index: int) -> bool:
        """Whether the layer of that index has experts."""
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0


class Mixture(nn.Module):
    """The experts of a layer, and the router that chooses among them."""

    def __init__(self, config: SDARMoEConfig) -> None:
        super().__init__()
        self.count, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).float().softmax(dim=-1)
        chosen = highest(scores, self.count)
        weight = scores.gather(1, chosen)
        if self.normalised:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return mix(self.experts, x, chosen, weight.to(x.dtype))


class SDARMoE(SDAR):
    """The network."""

    Config: ClassVar[type[SDARMoEConfig]] = SDARMoEConfig
    config: SDARMoEConfig

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        if not config.mixed(index):
            return super().make_layer(index)
        return Layer(config, Attention(config, norm=RMSNorm), Mixture(config))
