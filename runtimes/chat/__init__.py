"""Talking to a model: the conversation, its file and its commands, and a terminal's drawing of it."""
