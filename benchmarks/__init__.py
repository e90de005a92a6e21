"""Latency, memory, fidelity and accuracy of artifacts, beside the BF16 H100 baseline."""
