"""The mark of a value that must be given and is not."""

MISSING: str = "???"
"""As YAML configs write it."""
