"""The page of a run: a local server, and the same page as static files."""
