"""Taking weights in and out: official checkpoints, weights folders, diffusers pipelines."""
