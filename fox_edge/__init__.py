"""fox-edge: what Fox is, and the command line. Imports none of its siblings (cli.py alone does, lazily)."""

__version__ = "0.1.0"
