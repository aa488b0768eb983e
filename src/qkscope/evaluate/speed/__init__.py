"""How fast: every part of a run beside what the machine can do, and beside the published procedure."""
