"""`python -m runtimes.browser [FOLDER]`: a GGUF or ONNX export in the browser, or what is dropped there."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.browser.server import serve


def main() -> int:
    """Serve until interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m runtimes.browser", description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="a GGUF or ONNX export (default: the page waits for a drop)",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    args = parser.parse_args()
    try:
        server = serve(args.folder and Artifact.open(args.folder), args.port)
    except FoxEdgeError as error:
        say(f"runtimes.browser: {error}")
        return 2
    with server:
        say(f"open http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
