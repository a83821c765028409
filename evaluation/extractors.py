"""Feature extractors by name, among them networks that the user brings as a file.

A file is ONNX (run by onnxruntime, an optional extra) or TorchScript. The contract: one input of pixels 0..255 in NCHW
(float32, or uint8 where an ONNX graph says so), normalised by the network itself; its first output is the features,
flattened to [N, d]. Distances are reported as `FD[name]`, where the name is that of the file and the first digits of
its SHA-256.

Neither format runs pickled Python code. But a network is a program: TorchScript in particular has operators that touch
files, so take such a file only from where you would take a program.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promoe_ds.config.errors import did_you_mean, reject
from promoe_ds.evaluation.dinov2 import DINOv2, find_dinov2
from promoe_ds.evaluation.features import DigitsCNN, Extracted, FeatureExtractor, Features
from promoe_ds.evaluation.images import Images, brief
from promoe_ds.evaluation.inception import Inception, find_weights
from promoe_ds.utils.files import file_digest

SUFFIXES = (".onnx", ".pt")
EXTRACTORS = (DigitsCNN.name, "inception", "dinov2")
BATCH = 64


class External(FeatureExtractor):
    """Base of both: name, hash, shape check; a subclass runs the network on a batch."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch
        self.weights_sha256 = file_digest(path, state=hashlib.sha256())
        self.name = f"{path.stem}:{self.weights_sha256[:8]}"

    @abstractmethod
    def run(self, x_NCHW: np.ndarray) -> Any:
        """uint8 [N, C, H, W] -> array of N rows."""

    def extract(self, images_NHWC: Images) -> Extracted:
        """uint8 [N, H, W, C] -> features [N, d]. Raises `ConfigError` if the network fails or gives something else."""
        try:
            output = np.asarray(self.run(np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))))
        except Exception as error:  # whatever a foreign network raises
            fault = f"fails on images {list(images_NHWC.shape)} ({brief(error)})"
            reject("--features", self.path, fault, "it must take pixels 0..255 as [N, C, H, W]")
        if output.ndim < 2 or len(output) != len(images_NHWC) or not np.issubdtype(output.dtype, np.floating):
            fault = f"gives {output.dtype} {list(output.shape)} for {len(images_NHWC)} images"
            reject("--features", self.path, fault, "its first output must be float features [N, d]")
        features: Features = output.reshape(len(output), -1).astype(np.float32)
        if not np.isfinite(features).all():
            reject("--features", self.path, "gives features that are not finite", "it must take pixels 0..255")
        return Extracted(features)


class Onnx(External):
    """An ONNX graph on onnxruntime's CPU provider."""

    def __init__(self, path: Path, batch: int) -> None:
        try:
            import onnxruntime
        except ImportError:
            way_out = "pip install onnxruntime (the extra promoe_ds[onnx]), or name a TorchScript .pt"
            reject("--features", path, "ONNX needs onnxruntime, which is not installed", way_out)
        super().__init__(path, batch)
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exception types are private
            reject("--features", path, f"is no ONNX model that onnxruntime can run ({brief(error)})", "export it again")
        first = self._session.get_inputs()[0]
        self._input, self._dtype = first.name, np.uint8 if first.type == "tensor(uint8)" else np.float32
        if len(first.shape) != 4:
            reject("--features", path, f"takes an input of shape {first.shape}", "it must take [N, C, H, W]")
        count, *sides = (side if isinstance(side, int) else None for side in first.shape)
        self.image_shape = (sides[1], sides[2], sides[0])
        self.batch = count or batch
        if count and count > 1:
            reject("--features", path, f"takes exactly {count} images at once", "export it with a free batch dimension")

    def run(self, x_NCHW: np.ndarray) -> Any:
        return self._session.run(None, {self._input: x_NCHW.astype(self._dtype)})[0]


class TorchScript(External):
    """A TorchScript archive on any device, as float32 pixels."""

    def __init__(self, path: Path, batch: int, device: torch.device | str) -> None:
        super().__init__(path, batch)
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch advises torch.export, whose files hold pickles
                self._net = torch.jit.load(path, map_location=self._device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            fault = f"is no TorchScript archive ({brief(error)})"
            reject("--features", path, fault, "save it with torch.jit.save, or export it to ONNX; pickles are refused")

    def run(self, x_NCHW: np.ndarray) -> Any:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = self._net(torch.tensor(x_NCHW).to(self._device).float())
        output = (output[0] if isinstance(output, tuple | list) else output).cpu()
        return (output.float() if output.is_floating_point() else output).numpy()  # numpy has no bf16


def load_external(path: Path, batch: int, device: torch.device | str) -> External:
    """The network in a .onnx or .pt file. Raises `ConfigError` if it is absent or cannot be run."""
    if not path.is_file():
        reject("--features", path, "no such file", "name an existing .onnx or TorchScript .pt")
    return Onnx(path, batch) if path.suffix == ".onnx" else TorchScript(path, batch, device)


def usual_features(reference: str) -> str:
    """The extractor's name, where nobody says one."""
    return DigitsCNN.name if reference == "digits" else "inception"


def load_extractor(
    name: str,
    *,
    weights: Path | None = None,
    dinov2_weights: Path | None = None,
    device: torch.device | str = "cpu",
    batch: int = BATCH,
) -> FeatureExtractor:
    """Build `digits-cnn`, `inception`, `dinov2`, or a network from a file.

    `weights` is the weight file of inception, see `find_weights`, and `dinov2_weights` that of dinov2, see
    `find_dinov2`. `batch` images per forward, where the extractor has no size of its own.

    Raises:
        ConfigError: no such name or file, weights are absent or another network's, or given for one that is not named.
    """
    for network, path in (("inception", weights), ("dinov2", dinov2_weights)):
        if path is not None and name != network:
            reject(f"--{network}-weights", path, f"--features is {name}", "give one of the two")
    if name == "inception":
        return Inception(find_weights(weights), device, batch)
    if name == "dinov2":
        return DINOv2(find_dinov2(dinov2_weights), device, batch)
    if name == DigitsCNN.name:
        return DigitsCNN()
    if name.endswith(SUFFIXES):
        return load_external(Path(name), batch, device)
    known = f"choose one of {', '.join(EXTRACTORS)}, or name a .onnx or TorchScript .pt file"
    reject("--features", name, "no such feature extractor", did_you_mean(name, EXTRACTORS, known))
