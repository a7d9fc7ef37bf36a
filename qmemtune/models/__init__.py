"""Base models and tokenizers: where they come from, how they are stored, on which hardware they run."""
