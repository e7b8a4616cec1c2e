"""Comparisons with other libraries: collected where the optional group `parity` is installed.

Those of state space kernels need ESPnet too, by itself, as it asks for more than its S4 uses: pip install --no-deps espnet
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
if not (importlib.util.find_spec("espnet2") and importlib.util.find_spec("discretax")):
    collect_ignore_glob.append("test_state_space_kernels.py")
