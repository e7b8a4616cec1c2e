"""`linear_recurrence` of few channels on Hopper GPUs: parts of time lie side by side in the lanes of a program.

A program of kernels.py has 128 lanes, one per channel. With c <= 64 channels most of them would idle, and one lane would
run through all of time. Here S = 128 / c equal parts of time become channels of their own, (b, t, c) -> (b, t / S, S c), so
that a chain of steps is S times shorter. A first launch computes the effect of every part on the state. Composing S of
them, a few numbers per row, gives the state that enters each part. A second launch runs through all parts at once.

Arrays change their layout on the way in and out, and every lane reads what a token does to the state (`codes`). With fixed
complex a the forward pass moves 32 bytes per number besides the 16 that it must, most of it in the L2 cache.
"""

import dataclasses

import jax
import jax.numpy as jnp

from layers.kernels.linear_recurrence.gpu import kernels as gpu_kernels
from layers.kernels.linear_recurrence.gpu.kernels import KEPT, SKIPPED, Planes, Settings, plus, times
from layers.kernels.mosaic_gpu import LANES


def narrow(shape: tuple[int, ...]) -> bool:
    """Returns whether arrays (b, t, c) of this shape have room for two parts of time or more."""
    return shape[2] <= LANES // 2 and shape[1] >= LANES // shape[2]


@dataclasses.dataclass(frozen=True)
class _Fold:
    """`time` steps of `channels` in `parts` parts of `length` steps, in the direction of the recurrence."""

    time: int
    channels: int
    reverse: bool

    @property
    def parts(self) -> int:
        return LANES // self.channels

    @property
    def length(self) -> int:
        return -(-self.time // self.parts)

    @property
    def order(self) -> range:
        """The parts as the recurrence meets them."""
        return range(self.parts)[:: -1 if self.reverse else 1]

    def lay(self, planes: Planes, fill: Planes | None = None) -> Planes:
        """(b, t, c) to (b, length, parts c), with zeros, or `fill` (b, c), beyond the end."""
        return tuple(self._lay(p, None if fill is None else fill[i]) for i, p in enumerate(planes))

    def _lay(self, p: jax.Array, fill: jax.Array | None) -> jax.Array:
        if p.shape[1] == 1:
            return jnp.tile(p, (1, 1, self.parts))
        missing = self.parts * self.length - self.time
        rest = jnp.zeros((), p.dtype) if fill is None else fill.astype(p.dtype)[:, None]
        p = jnp.concatenate([p, jnp.broadcast_to(rest, (p.shape[0], missing, self.channels))], axis=1)
        p = p.reshape(p.shape[0], self.parts, self.length, self.channels)
        return p.swapaxes(1, 2).reshape(p.shape[0], self.length, -1)

    def back(self, planes: Planes) -> Planes:
        """(b, length, parts c) to (b, t, c)."""

        def back(p):
            p = p.reshape(p.shape[0], self.length, self.parts, self.channels).swapaxes(1, 2)
            return p.reshape(p.shape[0], -1, self.channels)[:, : self.time]

        return tuple(back(p) for p in planes)

    def codes(self, codes: jax.Array | None, rows: int) -> jax.Array | None:
        """A code per lane; steps beyond the end leave the state as it is."""
        missing = self.parts * self.length - self.time
        if codes is None:
            if not missing:
                return None
            codes = jnp.full((rows, self.time), KEPT, jnp.int32)
        codes = jnp.pad(codes, ((0, 0), (0, missing)), constant_values=SKIPPED)
        codes = codes.reshape(rows, self.parts, self.length).swapaxes(1, 2)
        return jnp.repeat(codes, self.channels, axis=2)

    def part(self, planes: Planes, number: int) -> Planes:
        """One part of (b, parts c): (b, c)."""
        return tuple(p[:, number * self.channels : (number + 1) * self.channels] for p in planes)

    def beside(self, stretches: dict[int, Planes]) -> Planes:
        """All parts, by number, as (b, parts c)."""
        ordered = [stretches[number] for number in range(self.parts)]
        return tuple(jnp.concatenate(p, axis=1) for p in zip(*ordered, strict=True))

    def entering(self, effects: tuple[Planes, Planes], state: Planes) -> Planes:
        """The state that enters every part, (b, parts c), from the one that enters the sequence."""
        stretches = {}
        for number in self.order:
            stretches[number] = state
            decay, contribution = (self.part(planes, number) for planes in effects)
            state = plus(times(decay, state), contribution)
        return self.beside(stretches)


def forward(a, x, codes, state, reverse, dtype, settings: Settings) -> tuple[Planes, Planes]:
    """Returns what `gpu_kernels.forward` does."""
    fold = _Fold(*x[0].shape[1:], reverse)
    a, x, codes = fold.lay(a), fold.lay(x), fold.codes(codes, x[0].shape[0])
    effects = gpu_kernels.effects(a, x, codes, reverse, False, settings)
    h, final = gpu_kernels.forward(a, x, codes, fold.entering(effects, state), reverse, dtype, settings)
    return fold.back(h), fold.part(final, fold.order[-1])


def backward(
    a, h, dh, codes, state, dfinal, reverse, input_type, settings: Settings
) -> tuple[Planes, Planes, Planes]:
    """Returns what `gpu_kernels.backward` does."""
    fold = _Fold(*h[0].shape[1:], reverse)
    opposite = dataclasses.replace(fold, reverse=not reverse)
    constant = a[0].shape[1] == 1
    # Beyond the end, which a reversed recurrence meets first, the state is the one that entered.
    h = fold.lay(h, state if reverse else None)
    a, dh, codes = fold.lay(a), fold.lay(dh), fold.codes(codes, dh[0].shape[0])
    last = tuple(p[:, 0 if reverse else -1].astype(jnp.float32) for p in h)
    before = {fold.order[0]: state}
    before |= {new: fold.part(last, old) for old, new in zip(fold.order, fold.order[1:], strict=False)}
    effects = gpu_kernels.effects(a, dh, codes, not reverse, True, settings)
    da, dx, dstate = gpu_kernels.backward(
        a,
        h,
        dh,
        codes,
        fold.beside(before),
        opposite.entering(effects, dfinal),
        reverse,
        input_type,
        settings,
    )
    if constant:
        da = tuple(p.reshape(p.shape[0], 1, fold.parts, -1).sum(2) for p in da)
    else:
        da = fold.back(da)
    return da, fold.back(dx), fold.part(dstate, fold.order[0])
