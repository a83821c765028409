"""One visit to a GPU: what is right on it, how fast, how much memory, where the time goes.

    python -m benchmarks.gpu                       # `make bench-gpu`: every stage, within 560 s
    python -m benchmarks.gpu --dry                 # the same with tiny models on a CPU: finds mistakes of these files
    python -m benchmarks.gpu.cifar --data FILE     # then ProMoE-S and Dense-S on CIFAR-10, a minute each

Needs torch, numpy, pyyaml and safetensors; DeepSpeed where it is there. `visit` runs the stages, each a process with a
time of its own, and `figures` keeps what they find, a line each, at once.
"""
