"""Artifact in, logits out: one runtime per file, each behind the Session protocol of base.py."""
