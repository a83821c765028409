"""What a run costs, from its configuration alone: parameters, FLOPs, memory, bytes sent."""
