"""The embedded model: Fox in miniature, and the code that trained it."""
