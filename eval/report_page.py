"""The page itself: HTML, style, code and data in one text.

What a model wrote is not trusted. Three things keep it from being anything but text: the data are compressed and written in
base64, whose letters end no element; the code puts strings into the page as text nodes only; and a content security policy
lets the browser run the scripts of the page by their hashes, no others, and load nothing from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

PAGE = Path(__file__).parent / "page"
STYLES = ("vendor/uPlot.min.css", "page.css")
SCRIPTS = (
    "vendor/uPlot.iife.min.js", "dom.js", "data.js", "curves.js", "router.js", "tables.js", "diff.js", "tokens.js",
    "sample.js", "samples.js", "live.js", "page.js",
)  # fmt: skip


def render(title: str, chunks: Mapping[str, Any], *, is_live: bool = False) -> str:
    """The page.

    Args:
        title: of the page.
        chunks: what the code asks for by name, values as for JSON; `index` is needed (see eval/report.py).
        is_live: whether the page may ask the server that it came from for more.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    styles, scripts = ([_source(name) for name in names] for names in (STYLES, SCRIPTS))
    return environment.get_template("index.html").render(
        title=title,
        policy=content_policy(is_live=is_live),
        styles=styles,
        scripts=scripts,
        licence=_source("vendor/uPlot-LICENSE.txt"),
        chunks={name: encode(value) for name, value in chunks.items()},
        is_live=is_live,
    )


def content_policy(*, is_live: bool) -> str:
    """The content security policy: our scripts and styles by their hashes, no network but the page's own server if live."""
    scripts = " ".join(_hash(_source(name)) for name in SCRIPTS)
    styles = " ".join(_hash(_source(name)) for name in STYLES)
    connect = "'self'" if is_live else "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; connect-src {connect}; "
        f"base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def encode(value: Any) -> str:
    """JSON, gzip, base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A text may hold half a surrogate pair, which UTF-8 cannot.
    raw = text.encode("utf-8", errors="replace")
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")


def decode(text: str) -> Any:
    """What `encode` was given."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def _source(name: str) -> str:
    text = (PAGE / name).read_text(encoding="utf-8")
    if "</script" in text.lower() or "</style" in text.lower():
        raise ValueError(f"eval/page/{name} would end its own element")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
