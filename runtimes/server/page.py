"""The chat page as one self-contained answer: markup, style and script in it, and nothing from elsewhere.

The policy that goes with it names exactly this script and this style by their hashes, so that nothing else
can run, and allows requests to this server only. Knows files and headers; not what the page does.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
# The look that all our pages share, then what only this one has.
_STYLES = (HERE.parent / "browser" / "style.css", HERE / "page.css")


class Page:
    """The page's HTML, and its Content-Security-Policy."""

    def __init__(self) -> None:
        style = "\n".join(path.read_text(encoding="utf-8") for path in _STYLES)
        script = (HERE / "page.js").read_text(encoding="utf-8")
        html = (HERE / "page.html").read_text(encoding="utf-8")
        self.html = html.replace("/* style */", style).replace("/* script */", script)
        self.policy = "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(script)}",
                f"style-src {_hash(style)}",
                "img-src data:",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )


def _hash(text: str) -> str:
    """How a policy names an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
