"""Expert choice within each image by a linear softmax gate: the EC-DiT baseline (arXiv:2410.02098).

Scores are a softmax over the experts; each expert then takes the k = S*K // E tokens of an image with the highest
score for it. A token may be taken by several experts or by none; the load is equal by construction. The rule is the
same in training and in inference, and an image does not depend on its batch.
"""

from __future__ import annotations

from torch import Tensor

from promoe_ds.moe.conditional_routing import Split
from promoe_ds.moe.gates import LinearGateRouter, PerImageConfig, top_tokens_per_image
from promoe_ds.moe.router import Routing, register_router


@register_router("expert_choice")
class ExpertChoiceRouter(LinearGateRouter):
    Config = PerImageConfig
    one_graph = True

    def forward(self, x_TD: Tensor, S: int, split: Split) -> Routing:
        """Each expert takes k tokens of each of B images. x_TD [T, D] -> Routing with N = B*E*k, expert by expert."""
        return top_tokens_per_image(self.scores(x_TD), S, S * self.config.top_k // self.num_experts)
