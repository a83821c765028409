"""Scores of image sets. Works alone: needs neither DeepSpeed nor a process group, only uint8 images on disk.

Reading order: `reference.py` (real images and noise), `features.py` (extractors), `metrics.py` (pure functions of
arrays), `evaluate.py` (sample set -> numbers). Distances on features other than the public Inception's are called
`FD[name]`, never FID.
"""
