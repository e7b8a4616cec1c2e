"""The walk of the Hopper kernels of `delta_rule` through the chunks of a row and head, by warpgroups with separate tasks."""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu.tiles import (
    BLOCK,
    CHUNK,
    SQUARE,
    Sizes,
    decay_matrix,
    fetch,
    indices,
    read,
)
from layers.kernels.mosaic_gpu import matrices, pl, plgpu, product

# Registers per lane of `Chain`: of the warpgroup that serves, and of two that walk. Three start with 168 each.
SERVING, WALKING = 104, 200


def chain_scratch(sizes: Sizes, stages: int, kinds: int, names: list[str]) -> dict[str, Any]:
    """Returns the shared memory of the inputs of `stages` chunks, of `scores` if q is one of them, and of barriers."""
    shapes = {
        **dict.fromkeys(("q", "k"), (CHUNK, sizes.key_dim)),
        **dict.fromkeys(("v", "do"), (sizes.blocks, CHUNK, BLOCK)),
        **dict.fromkeys(("inverse", "scores"), SQUARE),
    }
    made = ["scores"] if "q" in names else []
    tiles = {
        f"{name}_tiles": matrices((stages, *shapes[name]), jnp.bfloat16)
        for name in names + made
        if name != "vectors"
    }
    tiles["vectors_tiles"] = plgpu.SMEM((stages, 2, kinds, CHUNK), jnp.float32)
    copies = sum({"v": sizes.blocks, "do": sizes.blocks, "vectors": 2}.get(name, 1) for name in names)
    return tiles | {
        "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "made": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "used": plgpu.Barrier(num_arrivals=sizes.blocks, num_barriers=stages),
        "done": plgpu.Barrier(num_arrivals=sizes.blocks + 1),
    }


class Chain:
    """A warpgroup at the chunks of a row and head: one of those that walk, or the last of the program, which serves them.

    The serving warpgroup fetches the chunks and computes what depends on no state: G in the place of T and, if there are
    queries, P.
    """

    def __init__(
        self, sizes: Sizes, stages: int, refs: dict[str, Any], scale: float, *, reverse: bool = False
    ):
        self._sizes, self._stages, self._scale, self._reverse = sizes, stages, scale, reverse
        names = ("arrived", "made", "used", "done")
        self._arrived, self._made, self._used, self._done = (refs.pop(name) for name in names)
        self._tiles = {name.removesuffix("_tiles"): refs[name] for name in refs if name.endswith("_tiles")}
        self._sources = {name: refs[name] for name in self._tiles if name != "scores"}
        self.at = jax.lax.axis_index("row"), jax.lax.axis_index("head")
        self.block = jax.lax.axis_index("warpgroup")
        self.features = pl.ds(self.block * BLOCK, BLOCK)

    def run(self, walk: Any) -> None:
        """Runs `walk`, which calls `self.walk`, beside the warpgroup that serves, and ends together with all of them."""
        blocks = self._sizes.blocks
        limited = blocks == 2  # three warpgroups start with 168 registers per lane

        @pl.when(self.block == blocks)
        def _():
            if limited:
                plgpu.set_max_registers(SERVING, action="decrease")
            self._serve()

        @pl.when(self.block < blocks)
        def _():
            if limited:
                plgpu.set_max_registers(WALKING, action="increase")
            walk()

        plgpu.barrier_arrive(self._done)
        plgpu.barrier_wait(self._done)

    def enter(self, state: Any) -> jax.Array:
        """This warpgroup's block of an array (b, h, v, k)."""
        ref = state.at[*self.at, self.features]
        # The product removes the mark of arrays that differ between devices, which loops do not accept.
        return 1.0 * plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

    def tiles(self, slot: Any) -> dict[str, Any]:
        return {
            name: ref.at[slot, self.block] if name in ("v", "do") else ref.at[slot]
            for name, ref in self._tiles.items()
        }

    def walk(self, step: Any, carry: Any) -> Any:
        """Runs `step(chunk, slot, carry)`, which must have waited for its products, but not for copies out."""

        def go(turn, carry):
            slot = jax.lax.rem(turn, self._stages)
            plgpu.barrier_wait(self._arrived.at[slot])
            plgpu.barrier_wait(self._made.at[slot])
            carry = step(self._place(turn), slot, carry)
            plgpu.commit_smem()  # a copy may overwrite what this warpgroup read here
            plgpu.barrier_arrive(self._used.at[slot])
            return carry

        return jax.lax.fori_loop(0, self._sizes.chunks, go, carry)

    def _place(self, turn: Any) -> Any:
        return self._sizes.chunks - 1 - turn if self._reverse else turn

    def _serve(self) -> None:
        stages, chunks = self._stages, self._sizes.chunks
        pl.loop(0, min(stages, chunks))(lambda turn: self._bring(turn, turn))

        @pl.loop(0, chunks)
        def _(turn):
            before = turn - 1
            slot = jax.lax.rem(turn, stages)

            def refill():
                @pl.when((turn > 0) & (before + stages < chunks))
                def _():
                    old = jax.lax.rem(before, stages)
                    plgpu.barrier_wait(self._used.at[old])
                    self._bring(before + stages, old)

            if stages == 1:
                refill()
            plgpu.barrier_wait(self._arrived.at[slot])
            self._make(slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self._made.at[slot])
            if stages > 1:  # while the others are at the chunk made last
                refill()

        for turn in range(
            max(chunks - stages, 0), chunks
        ):  # every turn of a barrier must have been waited for
            plgpu.barrier_wait(self._used.at[turn % stages])

    def _make(self, slot: Any) -> None:
        tiles = {name: ref.at[slot] for name, ref in self._tiles.items()}
        decay = decay_matrix(tiles["vectors"], *indices())
        tiles["inverse"][...] = (read(tiles["inverse"]) * decay).astype(jnp.bfloat16)
        if "scores" in tiles:
            scores = product(tiles["q"], tiles["k"].T) * decay * self._scale
            tiles["scores"][...] = scores.astype(jnp.bfloat16)

    def _bring(self, turn: Any, slot: Any) -> None:
        (row, head), sizes = self.at, self._sizes
        chunk = self._place(turn)
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        pairs = []
        for name, source in self._sources.items():
            target = self._tiles[name].at[slot]
            if name in ("q", "k"):
                pairs.append((source.at[row, tokens, sizes.shared(head, source.shape[2])], target))
            elif name in ("v", "do"):
                pairs += [
                    (source.at[row, tokens, head, pl.ds(i * BLOCK, BLOCK)], target.at[i])
                    for i in range(sizes.blocks)
                ]
            elif name == "vectors":
                own = sizes.shared(head, source.shape[1])
                pairs += [(source.at[row, own, chunk], target.at[i]) for i in range(2)]
            else:
                pairs.append((source.at[row, sizes.shared(head, source.shape[1]), tokens], target))
        fetch(pairs, self._arrived.at[slot])
