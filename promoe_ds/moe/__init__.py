"""Mixture of experts: routing, dispatch, experts and the layer that joins them."""
