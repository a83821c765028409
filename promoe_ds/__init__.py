"""ProMoE diffusion transformers trained with DeepSpeed expert parallelism."""

__version__ = "0.1.0"
