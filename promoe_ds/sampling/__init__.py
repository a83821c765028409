"""Images of a trained model: image i depends on (seed, i) alone; many processes, resumable."""
