"""Text to token sequences: `Documents` (what there is), `Sequences` (batches of it), `check_text` (before a run)."""

from __future__ import annotations

from .check import check_text
from .documents import Document, Documents, Split, open_documents, split_of
from .sequences import Batch, Sequences

__all__ = ["Batch", "Document", "Documents", "Sequences", "Split", "check_text", "open_documents", "split_of"]
