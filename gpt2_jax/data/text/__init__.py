"""Text: documents, their blocks, and the tokenizers that encode them."""
