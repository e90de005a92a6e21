"""How far an artifact is from its checkpoint: verification, divergence, the streamed reference."""
