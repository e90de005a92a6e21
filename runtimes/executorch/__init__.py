"""Programs in ExecuTorch, PyTorch's runtime for phones: looked into, then opened and run on the CPU."""
