"""Loss and metrics of tasks with one label per sequence."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from layers.indices import check_indices, nan_outside
from layers.typing import Array, Float


def cross_entropy(
    logits: Float[Array, "b c"], batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean softmax cross-entropy in nats, and sums for metrics over many batches.

    loss = sum_i w_i (logsumexp(logits_i) - logits_i[label_i]) / sum_i w_i, in float32, with `batch["labels"]` (b,) and
    `batch["weight"]` (b,). A row of weight 0 is ignored, even if its logits are not finite. Without any weight
    the loss is 0. A traced label that is no class makes the loss and its gradients NaN.

    Returns:
      The loss, and the float32 sums {"loss": sum w_i loss_i, "accuracy": sum w_i [argmax logits_i = label_i],
      "count": sum w_i}. They are summed over batches and hosts, then divided by "count".

    Raises:
      ValueError: if the shapes are inconsistent, or a label that is not traced is not from 0 to classes - 1.
    """
    labels, weight = batch["labels"], batch["weight"]
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or weight.shape != logits.shape[:1]:
        raise ValueError(
            "logits must be (b, classes), labels and weight (b,); "
            f"got {logits.shape}, {labels.shape} and {weight.shape}"
        )
    labels, weight = jnp.asarray(labels), jnp.asarray(weight)
    counted, classes = weight > 0, logits.shape[1]
    check_indices("labels", labels, classes, counted=counted, of="the number of classes")
    logits = jnp.where(counted[:, None], logits.astype(jnp.float32), 0.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.clip(labels, 0, classes - 1))
    losses = nan_outside(losses, labels, classes, counted=counted)
    weight = weight.astype(jnp.float32)
    sums = {
        "loss": jnp.sum(weight * losses),
        "accuracy": jnp.sum(weight * (jnp.argmax(logits, axis=-1) == labels)),
        "count": jnp.sum(weight),
    }
    mean = sums["loss"] / jnp.where(sums["count"] > 0, sums["count"], 1.0)
    return mean, sums
