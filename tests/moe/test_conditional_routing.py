from __future__ import annotations

import torch

from promoe_ds.moe.conditional_routing import split_by_label


def test_conditional_images_come_first_and_order_is_restored() -> None:
    labels = torch.tensor([10, 3, 10, 1, 2])
    split = split_by_label(labels, 10, "cpu")
    assert split.num_conditional == 3
    assert split.label_B.tolist() == [3, 1, 2, 10, 10]
    assert torch.equal(split.label_B[split.restore_B], labels)
    assert torch.equal(labels[split.order_B], split.label_B)
