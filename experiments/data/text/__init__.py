"""Text: documents, tokenizers and rows of tokens."""
