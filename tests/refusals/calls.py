"""Calls from Python that are refused: a function without arguments, the error, and words of the message."""

from tests.refusals import caches, models, primitives, sections

ROWS = [*primitives.ROWS, *models.ROWS, *sections.ROWS, *caches.ROWS]
