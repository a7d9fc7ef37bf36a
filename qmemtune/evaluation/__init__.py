"""What a model does on held-out rows: loss, exact match, samples, benchmark tasks. One metric a file."""
