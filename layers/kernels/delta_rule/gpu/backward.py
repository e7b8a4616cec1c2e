"""The Hopper kernel of `delta_rule`'s backward pass that walks along time; forward.py has the equations and their letters.

With dS' the gradient of the state that leaves a chunk, and e = v - r k S the error of what the state holds,

    dy = P^T do + w k dS',   de = beta G^T dy = dv,   dS = total dS' + (scale r q)^T do - (r k)^T de,

which `chain` computes from the last chunk to the first, as `forward` walks from the first to the last. Given S, dS', de and
dy, the rest is local to the chunks; see gradients.py.

At 8 x 4096 tokens, 16 heads of 128, bfloat16, `chain` reads 0.47 GB and writes 0.54 GB, 0.34 ms at 3.0 TB/s; its products
take 0.19 ms at 400 TFLOP/s. The backward pass moves 3.3 GB, 1.1 ms, if `forward` recomputes the states, and 2.7 GB if the
forward pass keeps them. Half of the bytes are states, dS', dy and de on their way from the walks to
gradients.py.
"""

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu.chain import Chain, chain_scratch
from layers.kernels.delta_rule.gpu.tiles import (
    BETA,
    BLOCK,
    CHUNK,
    READ,
    WRITE,
    along_columns,
    by_column,
    send,
    sizes_of,
    wait_to_send,
)
from layers.kernels.mosaic_gpu import launch, matrices, pl, plgpu, product


def chain(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    dfinal: jax.Array,
    scale: float,
    stages: int,
    *,
    keeping: bool = True,
) -> dict[str, jax.Array]:
    """Returns the gradients of states, v and y, from a walk from the last chunk to the first, with states transposed.

    Args:
      made: `inverse`, which `prepare` returns.
      dfinal: (b, h, v, k), float32.
      stages: chunks of inputs in flight or in use.
      keeping: whether anything but `dstate` is needed.

    Returns:
      dstate: (b, h, v, k), float32, the gradient of the state that enters the first chunk.
      dstates: (b, h, chunks, v, k), bfloat16, the gradients of the states that leave the chunks.
      dv, dy: (b, t, h, v), bfloat16.
    """
    sizes = sizes_of(k, do)
    batch, time, heads, key_dim, value_dim = sizes
    inputs = {"q": q, "k": k, "do": do, "vectors": vectors, "dfinal": dfinal, "inverse": made["inverse"]}
    wide = jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16)
    outputs = {"dstate": jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), jnp.float32)}
    arriving = [name for name in inputs if name != "dfinal"]
    scratch = chain_scratch(sizes, stages, vectors.shape[-2], arriving)
    if keeping:
        shape = (batch, heads, sizes.chunks, value_dim, key_dim)
        outputs |= {"dstates": jax.ShapeDtypeStruct(shape, jnp.bfloat16), "dv": wide, "dy": wide}
        scratch |= {
            "state_tile": matrices((sizes.blocks, BLOCK, key_dim), jnp.bfloat16),
            "dv_tile": matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16),
            "dy_tile": matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16),
        }

    def body(*, dfinal, dstate, **refs):
        kept = {name: refs.pop(name) for name in ("dstates", "dv", "dy") if keeping}
        own = {name: refs.pop(name) for name in ("state_tile", "dv_tile", "dy_tile") if keeping}
        walk = Chain(sizes, stages, refs, scale, reverse=True)
        (row, head), here = walk.at, walk.block

        def step(chunk, slot, dleaving):
            tiles = walk.tiles(slot)
            vector = tiles["vectors"].at[1]
            into, onward, beta = (along_columns(by_column(vector.at[kind])) for kind in (READ, WRITE, BETA))
            rounded = dleaving.astype(jnp.bfloat16)
            if keeping:
                tile = own["state_tile"].at[here]
                wait_to_send(2)
                tile[...] = rounded
                send([(tile, kept["dstates"].at[row, head, chunk, walk.features])])
            given = plgpu.load(tiles["do"].T, layout=plgpu.Layout.WGMMA, optimized=False)
            written = product(rounded, tiles["k"].T) * onward
            written = product(given, tiles["scores"], written).astype(jnp.bfloat16)
            error = product(written, tiles["inverse"]) * beta
            if keeping:
                place = row, pl.ds(chunk * CHUNK, CHUNK), head, walk.features
                wait_to_send(2)
                own["dy_tile"].at[here].T[...] = written
                own["dv_tile"].at[here].T[...] = error.astype(jnp.bfloat16)
                send([(own[f"{name}_tile"].at[here], kept[name].at[*place]) for name in ("dy", "dv")])
            asked = (given.astype(jnp.float32) * (into * scale)).astype(jnp.bfloat16)
            entering = product(asked, tiles["q"], dleaving * vector[READ, CHUNK - 1])
            return product((error * (0.0 - into)).astype(jnp.bfloat16), tiles["k"], entering)

        def back():
            first = walk.walk(step, walk.enter(dfinal))
            dstate.at[row, head, walk.features][...] = first
            plgpu.wait_smem_to_gmem(0)

        walk.run(back)

    return launch(
        body,
        name="delta_rule_backward" if keeping else "delta_rule_backward_ends",
        grid={"row": batch, "head": heads},
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=sizes.blocks + 1,
    )
