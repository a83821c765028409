"""Everything that knows about ranks. Only the files of this package import deepspeed."""
