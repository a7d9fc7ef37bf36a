"""Rows to text, text to token ids and labels, token ids to batches."""
