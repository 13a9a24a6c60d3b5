"""Text: documents in, token streams out."""
