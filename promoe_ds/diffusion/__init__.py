"""Objectives and samplers: pure functions of tensors, joined by `objective.py`; no communication."""
