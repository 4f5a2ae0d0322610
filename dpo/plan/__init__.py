"""What a run will need: memory of a device, FLOPs, tokens, time. Without GPU, weights or torch."""
