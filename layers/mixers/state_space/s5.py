"""S5: one multi-input, multi-output diagonal state space model (Smith et al. 2023, arXiv:2208.04933)."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import hippo
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.ssm_kernel.discretize import bilinear, zoh
from layers.mixer import SELF, Mixer
from layers.options import ActivationDtype, Positive, checked_dataclass
from layers.parameters import declared, parameter
from layers.parts.state_space import check_steps, log_uniform
from layers.segments import Segments, select_real
from layers.typing import Array, Complex, Float

DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}


@checked_dataclass
class S5Config:
    """Options of `S5`.

    Attributes:
      width: d, number of input and output features.
      state_size: P, number of eigenvalues of the full system. With conj_sym half of them are stored.
      blocks: J, number of HiPPO-N blocks of size P / J on the initial diagonal.
      bidirectional: whether a second scan runs from the end, with its own output matrix; not causal.
      conj_sym: whether one of each conjugate pair is stored and the output is twice the real part.
      discretization: "zoh" or "bilinear".
      dt_min, dt_max: range of the initial step sizes, in units of one token; log-uniform, one per mode.
      c_init: "lecun_normal" or "truncated_normal" (drawn real in the HiPPO basis), or "complex_normal".
      clip_eigs: whether real parts of eigenvalues are clipped to at most -1e-4; useful for sequences longer than in
        training.
      step_rescale: factor on all step sizes, for inputs sampled at another rate than in training.
      dtype: dtype of the activations; the state is complex64.
    """

    width: int
    state_size: int = 64
    blocks: int = 1
    bidirectional: bool = False
    conj_sym: bool = True
    discretization: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 0.001
    dt_max: float = 0.1
    c_init: Literal["lecun_normal", "truncated_normal", "complex_normal"] = "lecun_normal"
    clip_eigs: bool = False
    step_rescale: Positive = 1.0
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        parts = self.blocks * (2 if self.conj_sym else 1)
        if self.state_size % parts:
            raise ValueError(
                f"state_size={self.state_size} cannot be cut into blocks={self.blocks}"
                f"{' of conjugate pairs' if self.conj_sym else ''}; it must be a multiple of {parts}"
            )
        check_steps(self.dt_min, self.dt_max)

    @property
    def modes(self) -> int:
        """Number of stored eigenvalues: P, or P / 2 with conjugate symmetry."""
        return self.state_size // (2 if self.conj_sym else 1)


class S5(Mixer):
    """S5: one diagonal state space model for all channels, run by a parallel scan (Smith et al. 2023, arXiv:2208.04933).

        h_t = exp(dt a) * h_{t-1} + (exp(dt a) - 1) / a * (B x_t)        (zero-order hold)
        y_t = 2 Re(C h_t) + D * x_t

    with a, dt (P/2), B (P/2 x d), C (d x P/2) complex except dt, and D (d). With `bidirectional` a second h runs from
    the end and C has a half for each. Initially a are the eigenvalues of the normal part of HiPPO-LegS of size P / J,
    J times, and B and C are real matrices transformed to that eigenbasis. The activation that the paper puts after it
    is a channel mixer: `half_glu1`, `half_glu2`, `full_glu` or `gelu`, in a joint residual branch.

    Where tokens are not evenly spaced, `segments.intervals` multiplies dt at each token; not with `bidirectional`.
    """

    patterns = SELF

    def __init__(self, config: S5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = self.takes_intervals = not config.bidirectional
        eigenvalues, vectors = _block_diagonal_hippo(config)
        pair = jnp.asarray(np.stack([eigenvalues.real, eigenvalues.imag]), jnp.float32)
        self.eigenvalues = declared(pair, group="ssm", axes=(None, "state"))
        steps, normal = log_uniform(config.dt_min, config.dt_max), nnx.initializers.normal(1.0)
        self.log_dt = parameter(rngs, steps, (config.modes,), group="ssm/dt", axes=("state",))
        inputs, outputs = (2, config.modes, config.width), (2, config.width, config.modes)
        self.b = parameter(rngs, _input_matrix(vectors), inputs, group="ssm/b", axes=(None, "state", "embed"))
        drawn, axes = _output_matrix(config, vectors), (None, "embed", "state")
        self.c = nnx.List(
            parameter(rngs, drawn, outputs, group="ssm_output", axes=axes)
            for _ in range(2 if config.bidirectional else 1)
        )
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output", axes=("embed",))

    def initial(self, batch_size: int, max_length: int | None) -> Complex[Array, "b n"]:
        return jnp.zeros((batch_size, self.config.modes), jnp.complex64)

    def mix(
        self, x: Float[Array, "b t d"], carried: Complex[Array, "b n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Complex[Array, "b n"]]:
        config = self.config
        gaps = None if segments is None else segments.intervals
        if carried is None and segments is not None and not segments.packed and segments.padding == "end":
            # Zeros after the tokens change no other output, and keep the decay equal at all tokens.
            x, segments = select_real(x, segments), None
        real, imaginary = self.eigenvalues[...]
        if config.clip_eigs:
            real = jnp.minimum(real, -1e-4)
        eigenvalues, dt = jax.lax.complex(real, imaginary), config.step_rescale * jnp.exp(self.log_dt[...])
        discretize, b = DISCRETIZATIONS[config.discretization], jax.lax.complex(self.b[0], self.b[1])
        if gaps is None:
            a, scale = discretize(eigenvalues, dt)
            a, b = a[None, None], scale[:, None] * b
        else:
            a, scale = discretize(eigenvalues[None, None], dt[None, None] * gaps[..., None])
        x = x.astype(config.dtype)
        inputs = jnp.einsum(
            "btd,cnd->cbtn",
            x,
            jnp.stack([b.real, b.imag]).astype(config.dtype),
            preferred_element_type=jnp.float32,
        )
        inputs = jax.lax.complex(inputs[0], inputs[1])
        inputs = inputs if gaps is None else scale * inputs
        h, last = linear_recurrence(a, inputs, initial_state=carried, segment_ids=segments)
        states = [h]
        if config.bidirectional:
            states.append(linear_recurrence(a, inputs, segment_ids=segments, reverse=True)[0])
        features = jnp.concatenate([part for h in states for part in (h.real, h.imag)], axis=-1)
        weights = jnp.concatenate([part for c in self.c for part in (c[0], -c[1])], axis=-1)
        factor = 2.0 if config.conj_sym else 1.0
        y = jnp.einsum("btn,dn->btd", features.astype(config.dtype), (factor * weights).astype(config.dtype))
        return y + self.d[...].astype(config.dtype)[None, None] * x, last


def _block_diagonal_hippo(config: S5Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns eigenvalues (modes) and eigenvectors (P x modes) of J copies of the normal part of HiPPO-LegS."""
    system = hippo.dplr_legs(config.state_size // config.blocks, half=config.conj_sym)
    size, modes = system.v.shape
    vectors = np.zeros((config.blocks, size, config.blocks, modes), complex)
    vectors[np.arange(config.blocks), :, np.arange(config.blocks)] = system.v
    return np.tile(system.eigenvalues, config.blocks), vectors.reshape(config.state_size, config.modes)


def _input_matrix(vectors: np.ndarray):
    """Initializer of B: a real matrix P x d of variance 1 / P in the eigenbasis (V unitary, so its inverse is V*)."""

    def init(key, shape, dtype):
        # The paper's code calls lecun_normal on (P, d), whose fan-in is P rather than d.
        real = nnx.initializers.lecun_normal()(key, (vectors.shape[0], shape[-1]), dtype)
        inverse = vectors.conj().T
        return jnp.stack([_exact(inverse.real, real), _exact(inverse.imag, real)]).astype(dtype)

    return init


def _output_matrix(config: S5Config, vectors: np.ndarray):
    """Initializer of C by `c_init`."""

    def init(key, shape, dtype):
        if config.c_init == "complex_normal":
            return math.sqrt(0.5) * jax.random.normal(key, shape, dtype)
        full = (config.width, vectors.shape[0], 2)
        if config.c_init == "lecun_normal":
            # Fan-in as in the paper's code: axis -2 times the leading axis.
            c = nnx.initializers.lecun_normal()(key, full, dtype)
        else:
            c = nnx.initializers.truncated_normal(1.0)(key, full, dtype) / np.sqrt(vectors.shape[0])
        real, imaginary = c[..., 0], c[..., 1]
        return jnp.stack(
            [
                _exact(real, vectors.real) - _exact(imaginary, vectors.imag),
                _exact(real, vectors.imag) + _exact(imaginary, vectors.real),
            ]
        ).astype(dtype)

    return init


def _exact(left, right):
    """Returns a float32 matrix product in full precision on every device."""
    return jnp.matmul(
        jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
