"""Artifact in, logits out: a room per library, each behind the Session protocol of base.py."""
