"""Objectives and samplers: pure functions of tensors, no communication."""
