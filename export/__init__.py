"""Checkpoint in, artifact out: one exporter per format."""
