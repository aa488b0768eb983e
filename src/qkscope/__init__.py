"""qkscope: why does this attention head look there?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qkscope")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0.0.0"
