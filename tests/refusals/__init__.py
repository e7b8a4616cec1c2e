"""What a user gets wrong, one row a mistake, and the words that the refusal must hold; `tests/test_refusals.py` runs them."""
