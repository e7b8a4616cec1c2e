"""Published checkpoints as models of ours, and back: config.json and safetensors as transformers writes them.

    model, config = seqmodels.load_pretrained("checkpoints/Qwen3-0.6B")
    seqmodels.save_pretrained(model, "checkpoints/mine")

A family (`seqmodels.interop.families`) is a table of pairs of names and a function from its config to ours. Nothing is unpickled
and nothing is fetched.
"""

from seqmodels.interop.adapters import load_adapter, save_adapter
from seqmodels.interop.loading import load_pretrained
from seqmodels.interop.saving import save_pretrained

__all__ = ["load_adapter", "load_pretrained", "save_adapter", "save_pretrained"]
