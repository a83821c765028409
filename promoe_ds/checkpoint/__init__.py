"""What a checkpoint is, how it is written, resumed from, loaded and converted; needs no DeepSpeed."""
