"""From pixels to latents, on the device, as batches are taken from their stream."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from promoe_ds.data.batch import Batch
from promoe_ds.data.coded_images import CodedImages


class StepEncoder:
    """Encodes the batches of a stream; on a GPU those of the next step while the model computes this one.

    Args:
        dataset: is moved to `device`.
        ahead: begin the next step's. That needs a stream and the encoder's activations beside the model's: if memory
            does not allow it, each step encodes its own first, as on a CPU, where there is nothing to gain.
    """

    def __init__(self, dataset: CodedImages, device: torch.device, ahead: bool | None = None):
        self.dataset, self.ahead = dataset.to(device), device.type == "cuda" if ahead is None else ahead
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights are on their way
        self._begun: tuple[list[Batch], list[Batch]] | None = None

    def __call__(self, batches: list[Batch], following: list[Batch] | None = None) -> list[Batch]:
        """`batches` with latents in place of pixels.

        Args:
            following: those of the next step, if they are there already.
        """
        source, encoded = self._begun or (None, None)
        if encoded is None or source is not batches:
            encoded = self._encoded(batches)
        elif self.stream is not None:
            here = torch.cuda.current_stream(self.stream.device)
            here.wait_stream(self.stream)
            for batch in encoded:  # its memory belongs to the other stream, which must not write there before we read
                batch.x_BCHW.record_stream(here)
        self._begun = None
        if self.ahead and following is not None:
            self._begin(following)
        return encoded

    def _begin(self, following: list[Batch]) -> None:
        try:
            with torch.cuda.stream(self.stream):  # None: no change
                self._begun = following, self._encoded(following)
        except torch.OutOfMemoryError:
            self.ahead = False
            torch.cuda.empty_cache()
            print(
                "data.vae: no memory to encode a step ahead, so each step begins with it", file=sys.stderr, flush=True
            )

    def _encoded(self, batches: list[Batch]) -> list[Batch]:
        return [
            replace(batch, x_BCHW=self.dataset.encode(batch.x_BCHW, batch.posterior_BCHW), posterior_BCHW=None)
            for batch in batches
        ]
