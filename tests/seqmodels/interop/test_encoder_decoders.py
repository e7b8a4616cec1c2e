"""Tiny encoder-decoders that transformers made: logits of targets of a source, and greedy targets; round trips are in `test_families`."""

import jax
import numpy as np
import pytest

import seqmodels
from tests.seqmodels.interop.test_families import DATA, FOLDERS, SINGLE, close, expected

SOURCED = [name for name in FOLDERS if name not in SINGLE]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in SOURCED])
def test_logits_and_padding_on_both_sides(name):
    """A full pass, and one with padding in front of and behind the rows of both sides, of a token that would be seen."""
    model, _ = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    source, target = want["source"], want["tokens"]
    width = source.shape[1]
    padded, real = np.full((2, 2, width + 3), 7), np.zeros((2, 2, width + 3), np.int32)
    for side, ids in enumerate((source, target)):
        padded[side, 0, 3:], padded[side, 1, :width] = ids
        real[side, 0, 3:], real[side, 1, :width] = 1, 1

    @jax.jit
    def run(source, target, padded, real):
        beside, _ = model(*padded, source_segment_ids=real[0], segment_ids=real[1])
        return model(source, target)[0], beside

    full, beside = run(source, target, padded, real)
    close(full, want["logits"])
    close(np.stack([beside[0, 3:], beside[1, :width]]), want["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCED)
def test_greedy_targets(name):
    """From the token 0, by steps that read the source once."""
    model, _ = seqmodels.load_pretrained(DATA / name)
    want = expected(name)
    made = seqmodels.generate_from(
        model, want["source"], start=0, max_new_tokens=want["greedy"].shape[1], temperature=0
    )
    np.testing.assert_array_equal(made.tokens, want["greedy"])


@pytest.mark.slow
def test_tables_that_differ_between_layers_are_not_written(tmp_path):
    model, _ = seqmodels.load_pretrained(DATA / "longt5", scan=False)
    table = model.decoder.stack.blocks[1].mixer.position.table
    table[...] = table[...] + 1
    with pytest.raises(
        ValueError, match="decoder/stack/blocks/0/mixer/position/table and those of later layers differ"
    ):
        seqmodels.save_pretrained(model, tmp_path / "out")
