"""Loss and metrics of tasks with labels at positions of a sequence."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from experiments.data.pipeline import IGNORE
from layers.cross_entropy import Unprojected, linear_cross_entropy
from layers.indices import check_indices, nan_outside
from layers.typing import Array, Bool, Float


def is_counted(batch: Mapping[str, Array]) -> Bool[Array, "b t"]:
    """Returns True at the labels to predict, in rows whose weight is not 0."""
    return (batch["labels"] != IGNORE) & (batch["weight"] > 0)[:, None]


def cross_entropy(
    outputs: Float[Array, "b t v"] | Unprojected, batch: Mapping[str, Array], *, z_loss: float = 0.0
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean softmax cross-entropy in nats over the labels, and sums for metrics over many batches.

    loss = sum_p (l_p - logits_p[label_p] + z_loss l_p^2) / count, with l_p = logsumexp(logits_p), over the positions p of
    `batch["labels"]` (b, t) that are not IGNORE (-1) in rows with `batch["weight"]` (b,) not 0. Logits elsewhere are
    ignored, even if they are not finite. Without any label the loss is 0. A traced label that is neither a token nor IGNORE
    makes the loss and its gradients NaN.

    Args:
      outputs: logits (b, t, v), or what they are computed from; then they are never in memory at once, unless they are
        bounded.
      z_loss: weight of the z-loss, which keeps logits near zero (Chowdhery et al. 2022, arXiv:2204.02311).

    Returns:
      The loss, and the float32 sums {"loss", "accuracy": labels that have the largest logit, "count": labels,
      "sequence_accuracy": rows in which all labels have it, "sequence_accuracy_count": rows with a label}, and with a z-loss
      "cross_entropy", the loss without it.

    Raises:
      ValueError: if the shapes are inconsistent, or a label that is not traced is neither a token nor IGNORE.
    """
    labels, weight = batch["labels"], batch["weight"]
    if isinstance(outputs, Unprojected) and outputs.logit_cap is not None:
        outputs = outputs.logits
    shape = (*outputs.x.shape[:2], len(outputs.matrix)) if isinstance(outputs, Unprojected) else outputs.shape
    if len(shape) != 3 or labels.shape != shape[:2] or weight.shape != shape[:1]:
        raise ValueError(
            "logits must be (b, t, vocabulary), labels (b, t) and weight (b,); "
            f"got {shape}, {labels.shape} and {weight.shape}"
        )
    counted = is_counted(batch)
    labels, vocabulary = jnp.where(counted, labels, 0), shape[2]
    check_indices("labels", labels, vocabulary, of="the vocabulary of the logits")
    if isinstance(outputs, Unprojected):
        loss, losses, hits = linear_cross_entropy(outputs.x, outputs.matrix, labels, counted, z_loss=z_loss)
    else:
        logits = jnp.where(counted[..., None], outputs.astype(jnp.float32), 0.0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.clip(labels, 0, vocabulary - 1))
        losses = nan_outside(losses, labels, vocabulary, counted=counted)
        squares = jax.nn.logsumexp(logits, axis=-1) ** 2 if z_loss else 0.0
        loss, hits = jnp.sum(losses + z_loss * squares, where=counted), jnp.argmax(logits, axis=-1) == labels
    rows = jnp.any(counted, axis=1)
    sums = {
        "loss": loss,
        **({"cross_entropy": jnp.sum(losses, where=counted)} if z_loss else {}),
        "accuracy": jnp.sum(hits & counted),
        "sequence_accuracy": jnp.sum(jnp.all(hits | ~counted, axis=1) & rows),
        "sequence_accuracy_count": jnp.sum(rows),
        "count": jnp.sum(counted),
    }
    sums = {name: value.astype(jnp.float32) for name, value in sums.items()}
    return sums["loss"] / jnp.maximum(sums["count"], 1.0), sums
