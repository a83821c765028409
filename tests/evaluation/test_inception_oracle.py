"""Against torch-fidelity 0.4.0 itself; torch_fidelity_oracle.py says how to run it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from promoe_ds.evaluation.inception import load_inception, resize_tf1
from promoe_ds.evaluation.kernel_distance import kernel_distance
from promoe_ds.evaluation.manifold import manifold
from promoe_ds.evaluation.metrics import frechet_distance, gaussian_statistics, inception_score
from tests.evaluation.conftest import Scored
from tests.evaluation.random_inception import pictures
from tests.evaluation.torch_fidelity_oracle import GOLDEN, SAMPLES, available, import_torch_fidelity, oracle

pytestmark = pytest.mark.skipif(not available(), reason="torch-fidelity is not installed: golden numbers stand for it")


def test_resize_is_bit_equal():
    import_torch_fidelity()
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as theirs

    for shape in ((32, 32), (64, 256), (256, 256), (299, 200), (512, 333)):
        x = torch.tensor(pictures(1, 3, (shape[0] // 8 * 8, shape[1] // 8 * 8))).permute(0, 3, 1, 2).float()
        assert torch.equal(resize_tf1(x), theirs(x, (299, 299), align_corners=False)), shape


def test_features_and_metrics(scored: Scored):
    samples, reference, metrics = oracle(scored.weights)
    net = load_inception(scored.weights)
    with torch.inference_mode():
        ours = net(torch.tensor(pictures(*SAMPLES)).permute(0, 3, 1, 2))
    for key, found in zip(("pool", "spatial", "logits"), ours, strict=True):
        error = np.linalg.norm(found.numpy() - samples[key]) / np.linalg.norm(samples[key])
        assert error < 1e-5, (key, error)
    for key, called in {"FID": "FD", "sFID": "sFD", "IS": "IS", "precision": "precision", "recall": "recall"}.items():
        assert scored.metrics[f"{called}[{scored.metrics['features']}]"] == pytest.approx(metrics[key], rel=1e-5), key
    assert inception_score(samples["logits"], split=4) == pytest.approx(metrics["IS2"], rel=1e-5)
    assert json.loads(str(np.load(GOLDEN)["metrics"])) == pytest.approx(metrics, rel=1e-5)
    assert len(reference["pool"]) == 9


def test_metrics_of_given_features():
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((300, 12), np.float32), 1.2 * rng.standard_normal((200, 12), np.float32) + 0.3
    tensors = [torch.from_numpy(x) for x in (u, v)]
    both = [fid_features_to_statistics(x) for x in tensors]
    fid = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*gaussian_statistics(u), *gaussian_statistics(v))
    assert ours == pytest.approx(fid, rel=1e-6)  # its means are float32
    score = isc_features_to_metric(tensors[0], 3, False, 0)["inception_score_mean"]
    assert inception_score(u, split=100) == pytest.approx(score, rel=1e-6)
    pair = prc_features_to_metric(*tensors, prc_neighborhood=3, prc_batch_size=70, save_cpu_ram=False, verbose=False)
    assert 0.2 < pair["precision"] < 0.99 and 0.2 < pair["recall"] < 0.99
    assert manifold(u, v, block=64)[:2] == pytest.approx((pair["precision"], pair["recall"]), rel=1e-6)
    both = [x.double() for x in tensors]
    kid = kid_features_to_metric(*both, kid_subsets=20, kid_subset_size=70, verbose=False)
    ours = kernel_distance(u, v, subsets=20, size=70)
    assert ours == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-10)
