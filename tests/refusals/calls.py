"""Calls from Python that are refused: a function without arguments, the error, and words of the message."""

from tests.refusals import cache_training, caches, drafts, mixers, model_calls, models, primitives, sections

TABLES = (primitives, mixers, models, model_calls, sections, caches, cache_training, drafts)
ROWS = [row for table in TABLES for row in table.ROWS]
