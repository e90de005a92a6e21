"""Many exports, measured and questioned as a graph of steps, here or on a cluster."""
