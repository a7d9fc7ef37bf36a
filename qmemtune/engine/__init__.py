"""One training engine for all adapters, on transformers' Trainer."""
