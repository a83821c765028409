"""Scores of image sets. Works alone: needs neither DeepSpeed nor the model, only uint8 images, on disk or in a stream.

Reading order: `images.py` and `samples.py` (what is read), `features.py`, `inception.py`, `extractors.py`,
`collect.py` (images -> what is kept), `reference.py`, `metrics.py`, `manifold.py` and `kernel_distance.py` (pure
functions of arrays), `evaluate.py` (all of it joined), `report.py`. Distances on features other than the public
Inception's are called `FD[name]`, never FID.
"""
