"""Speculation with a draft model that does not fit."""

import seqmodels
from tests.refusals.caches import LRU
from tests.refusals.models import model


def drafted(draft=True, *, new=4, **options):
    """A call of `generate` with a draft model of shapes alone, or with what is given for one."""
    given = model(**draft)() if isinstance(draft, dict) else model()() if draft is True else draft
    return lambda: seqmodels.stream(model()(), [[1, 2, 3]], max_new_tokens=new, draft=given, **options)


ROWS = [
    (drafted(cache="h2o(budget=4)"), ValueError, "draft with cache='h2o(budget=4)': a draft that fails"),
    (drafted("runs/small"), TypeError, "draft is a str; expected a LanguageModel"),
    (drafted(draft_tokens=0), ValueError, "draft_tokens=0; expected an integer of at least 1"),
    (drafted(None, draft_tokens=2), ValueError, "draft_tokens=2 has no effect without draft"),
    (drafted(None, draft_cache="full"), ValueError, "draft_cache='full' has no effect without draft"),
    (drafted(lookup=2), ValueError, "lookup=2 with a draft model: each makes drafts; expected one of them"),
    (drafted(dict(vocab_size=8)), ValueError, "draft has vocab_size=8; expected 9, that of the model"),
    (
        drafted(dict(absolute_positions="learned", max_positions=5)),
        ValueError,
        "draft has max_positions=5, but a prompt of 3 tokens and max_new_tokens=4 need 6",
    ),
    (
        drafted(dict(absolute_positions="learned", max_positions=7, first_position=2)),
        ValueError,
        "draft has max_positions=7, but a prompt of 3 tokens and max_new_tokens=4 need 8",
    ),
    (
        drafted(LRU, draft_cache="streaming(budget=4, sinks=1)"),
        ValueError,
        "draft_cache=Streaming has nothing to act on: no layer (lru) holds keys",
    ),
    (drafted(draft_cache="snapkv"), ValueError, "draft_cache='snapkv' acts on whole prompts; expected a"),
    (drafted(draft_cache="streaming(budget=9)"), ValueError, "budget=9 of the cache is more than the 6"),
]
