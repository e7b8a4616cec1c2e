"""What a student learns from a teacher: the distribution of its outputs, and what its layers give."""

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.tasks.tokens import is_counted
from layers.cross_entropy import Unprojected
from layers.options import NonNegative, Positive, checked_dataclass
from layers.typing import Array, Float

# Entries of a batch that a teacher adds.
LOGITS, HIDDEN = "teacher_logits", "teacher_hidden"
KINDS = ("language_model", "classifier")


@checked_dataclass(section="train.distill")
class DistillConfig:
    """Options of distillation (Hinton et al. 2015, arXiv:1503.02531), the mapping `train.distill`.

        loss = labels * cross_entropy + logits * T^2 D + hidden * H                     summed over labels

    with D the divergence of the distributions p of the teacher and q of the student at temperature T, D = sum_v p_v log(p_v / q_v)
    if "forward", and D = sum_v q_v log(q_v / p_v) if "reverse"; and H the mean over layers l and real tokens of
    |h_l - g_l|^2 / |g_l|^2, h_l the stream of the student after a layer and g_l that of the teacher.

    Attributes:
      teacher: work directory of a run, whose best checkpoint teaches, or folder of a published checkpoint.
      start: where the student begins: "teacher", "seed", or a folder as for `teacher`, such as an earlier stage. Parameters of the
        same name and shape begin as there, so do those of a `mamba2` in place of an `attention` with as many heads of the same
        size (see `seqmodels.from_attention`), and the others as the seed says.
      temperature: T.
      divergence: direction of D; the reverse one is that of Apriel-H1 (Ostapenko et al. 2025, arXiv:2511.02651).
      logits, hidden, labels: weights. Streams need as many layers of as many features, which then run without `scan`.
    """

    teacher: str
    start: str = "teacher"
    temperature: Positive = 1.0
    divergence: Literal["forward", "reverse"] = "forward"
    logits: NonNegative = 1.0
    hidden: NonNegative = 0.0
    labels: NonNegative = 0.0

    def __post_init__(self) -> None:
        if not self.logits and not self.hidden:
            raise ValueError(
                "train.distill.logits=0 and train.distill.hidden=0 leave nothing to distill; expected one of them above 0"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the sums that `distilled` returns."""
        weights = {"divergence": self.logits, "hidden_error": self.hidden}
        return tuple(name for name, weight in weights.items() if weight)

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries that the teacher adds to a batch."""
        return tuple(name for name, weight in {LOGITS: self.logits, HIDDEN: self.hidden}.items() if weight)


def distilled(
    config: DistillConfig,
    sums: Mapping[str, Array],
    outputs: Float[Array, "b *t v"] | Unprojected,
    hidden: Sequence[Float[Array, "b t d"]],
    batch: Mapping[str, Array],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of distillation, summed over labels, and its parts without weights.

    Args:
      sums: sums of the loss of the task.
      outputs: what the student gives.
      hidden: the stream of the student after each layer; not read without `config.hidden`.
      batch: the batch with what the teacher adds.

    Raises:
      ValueError: the batch has nothing of a teacher.
    """
    if missing := [name for name in config.entries if name not in batch]:
        raise ValueError(
            f"the batch has no {' and no '.join(missing)}; with train.distill a step takes batches that the teacher has read, as "
            "experiments.train does"
        )
    loss, parts = config.labels * sums["loss"], {}
    if config.logits:
        student = outputs.logits if isinstance(outputs, Unprojected) else outputs
        counted = is_counted(batch) if student.ndim == 3 else batch["weight"] > 0
        found = divergences(student, batch[LOGITS], counted, config.temperature, config.divergence)
        weight = 1.0 if student.ndim == 3 else batch["weight"]
        parts["divergence"] = config.temperature**2 * jnp.sum(weight * found)
        loss += config.logits * parts["divergence"]
    if config.hidden:
        errors = hidden_errors(jnp.stack(hidden, axis=2), batch[HIDDEN])
        ids = batch.get("segment_ids")
        rows = jnp.broadcast_to((batch["weight"] > 0)[:, None], errors.shape)
        real = rows if ids is None else rows & (ids != 0)
        mean = jnp.sum(errors, where=real) / jnp.maximum(jnp.sum(real), 1)
        parts["hidden_error"] = mean * sums["count"]
        loss += config.hidden * parts["hidden_error"]
    return loss, parts


def divergences(
    student: Float[Array, "b *t v"],
    teacher: Float[Array, "b *t v"],
    counted: Array,
    temperature: float,
    direction: Literal["forward", "reverse"],
) -> Float[Array, "b *t"]:
    """Returns the divergence of two distributions by their logits, in nats, and 0 where it is not counted."""
    logits = (jnp.where(counted[..., None], each.astype(jnp.float32), 0.0) for each in (student, teacher))
    q, p = (jax.nn.log_softmax(each / temperature) for each in logits)
    first, second = (p, q) if direction == "forward" else (q, p)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def hidden_errors(student: Float[Array, "b t l d"], teacher: Float[Array, "b t l d"]) -> Float[Array, "b t"]:
    """Returns the squared distance of two streams relative to the second, as a mean over layers; 0 where that is 0."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    size = jnp.sum(teacher**2, axis=-1)
    distance = jnp.sum((student - teacher) ** 2, axis=-1)
    return jnp.mean(jnp.where(size > 0, distance / jnp.where(size > 0, size, 1.0), 0.0), axis=-1)
