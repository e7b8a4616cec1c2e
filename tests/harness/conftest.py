"""The adapter runs on tasks of the library itself: collected where the extra `eval` is installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("lm_eval") else ["test_*.py"]
