"""One operation a file: its torch form, and faster forms where they exist."""
