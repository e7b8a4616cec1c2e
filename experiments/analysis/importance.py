"""How much a trained model needs the mixer of each layer: what is lost without it."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.training.experiment import Experiment
from experiments.training.model import SplitModel
from experiments.training.step import means
from experiments.training.teacher import Source, arrays_for
from layers.mixer import Mixer
from layers.segments import Segments
from layers.typing import Array, Float
from seqmodels import build_model


class Silent(Mixer):
    """A mixer that gives zeros, so that a residual branch adds nothing."""

    def __init__(self, mixer: Mixer):
        self.config, self.causal, self.takes_gaps = mixer.config, mixer.causal, mixer.takes_gaps

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: None,
        segments: Segments | None,
    ) -> tuple[Float[Array, "b t d"], None]:
        return jnp.zeros_like(x), carried


def metrics_without(
    plan: Experiment, source: Source, layers: Iterable[int], split: str = "validation"
) -> dict[str, float]:
    """Returns the metrics of a trained model on a split of a task, with the mixers of some layers silent.

    Args:
      plan: the experiment whose task it is.
      source: the trained model.
      layers: layers from 0; none measures the model as it is.
    """

    def make(rngs: nnx.Rngs) -> nnx.Module:
        model = build_model(source.values, rngs=rngs)
        for layer in layers:
            block = model.stack.blocks[layer]
            block.mixer = Silent(block.mixer)
        return model

    layers, task = tuple(layers), plan.task
    model = SplitModel(make, padding=task.padding, packed=task.packed, unprojected=task.unprojected)
    arrays = arrays_for(model, source.read())

    @jax.jit
    def add(arrays: Any, totals: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        outputs, _ = model(*arrays, batch, key=None)
        _, sums = task.loss(outputs, batch)
        return {name: total + sums[name] for name, total in totals.items()}

    totals = dict.fromkeys(plan.metric_names, jnp.zeros((), jnp.float32))
    for batch in plan.eval_batches(split):
        totals = add(arrays, totals, dict(batch))
    return means(plan.metric_names, jnp.stack(list(totals.values())))


def leave_one_out(plan: Experiment, source: Source, layers: Iterable[int]) -> dict[int, float]:
    """Returns what the validation loses without the mixer of each layer, I_l = P(model) - P(model without l).

    P is the metric that chooses checkpoints, negated where lower is better. As in Apriel-H1 (Ostapenko et al. 2025,
    arXiv:2511.02651), the layer of the lowest importance is the first that another mixer may replace.
    """
    whole = plan.score(metrics_without(plan, source, ()))
    return {layer: whole - plan.score(metrics_without(plan, source, (layer,))) for layer in layers}
