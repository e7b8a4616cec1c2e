"""Calls of the primitives with arguments that do not fit."""

import jax.numpy as jnp
import numpy as np

from layers.kernels.attention import Logits, Mask, Tokens, attention
from layers.kernels.delta_rule import delta_rule, dplr_delta_rule
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.long_conv import long_conv
from layers.kernels.segments import Segments
from layers.kernels.selective_scan import selective_scan
from layers.kernels.short_conv import short_conv
from layers.kernels.ssm_kernel import ssm_kernel


def ones(*shape, dtype="float32"):
    return jnp.asarray(np.ones(shape, dtype))


X = ones(2, 5, 4)
HEADS = ones(2, 5, 2, 4)
BETA = ones(2, 5, 2)
STATES, PROJECTION = ones(4, 3), ones(2, 5, 1, 3)
LONG, SHORT, CHANNELS = ones(4, 5), ones(4, 4), ones(4)
IDS = ones(2, 5, dtype="int32")
WHOLE = ones(2, 5, 4, dtype="int32")
FLOAT = "expected a floating-point or complex type"
REAL = "expected a real floating-point type"


def recurrence(a=X, x=X, **options):
    return lambda: linear_recurrence(a, x, **options)


def scan(x=X, dt=X, a=-STATES, b=PROJECTION, c=PROJECTION, **options):
    return lambda: selective_scan(x, dt, a, b, c, **options)


def gla(q=HEADS, k=HEADS, v=HEADS, **options):
    return lambda: gated_linear_attention(q, k, v, **options)


def delta(q=HEADS, k=HEADS, v=HEADS, beta=BETA, **options):
    return lambda: delta_rule(q, k, v, beta, **options)


def dplr(q=HEADS, k=HEADS, v=HEADS, a=HEADS, b=HEADS, **options):
    return lambda: dplr_delta_rule(q, k, v, a, b, **options)


def convolution(x=X, kernel=LONG, **options):
    return lambda: long_conv(x, kernel, **options)


def taps(x=X, weight=SHORT, bias=None, **options):
    return lambda: short_conv(x, weight, bias, **options)


def kernel(a=STATES, b=STATES, c=STATES, dt=CHANNELS, length=8, **options):
    return lambda: ssm_kernel(a, b, c, dt, length=length, **options)


def softmax(q=HEADS, k=HEADS, v=HEADS, **options):
    return lambda: attention(q, k, v, **options)


LINEAR_RECURRENCE = [
    (recurrence(x=WHOLE), TypeError, f"x has dtype int32; {FLOAT}"),
    (recurrence(a=WHOLE), TypeError, f"a has dtype int32; {FLOAT}"),
    (recurrence(x=ones(5, 4)), ValueError, "x has shape (5, 4); expected (b, t, d)"),
    (recurrence(a=ones(2, 5, 3)), ValueError, "a has shape (2, 5, 3); expected (b|1, t|1, d)"),
    (recurrence(a=ones(4)), ValueError, "a has shape (4,); expected (b|1, t|1, d)"),
    (recurrence(initial_state=ones(3, 4)), ValueError, "initial_state has shape (3, 4); expected (b, d)"),
    (recurrence(initial_state=ones(2, 1, 4)), ValueError, "initial_state has shape (2, 1, 4)"),
    (
        recurrence(initial_state=ones(2, 4, dtype="complex64")),
        TypeError,
        "initial_state is complex but a and x are real",
    ),
    (
        recurrence(segment_ids=ones(2, 4, dtype="int32")),
        ValueError,
        "segment_ids has shape (2, 4); expected (b, t)",
    ),
    (
        recurrence(segment_ids=ones(2, 5)),
        TypeError,
        "segment_ids has dtype float32; expected an integer type",
    ),
    (recurrence(impl="xlaa"), ValueError, "impl='xlaa' is not an implementation of linear_recurrence"),
    (recurrence(impl="gpu"), ValueError, "impl='gpu' of linear_recurrence cannot take this call"),
    (recurrence(impl="tpu"), ValueError, "impl='tpu' of linear_recurrence cannot take this call"),
]
SELECTIVE_SCAN = [
    (scan(x=WHOLE), TypeError, f"x has dtype int32; {REAL}"),
    (scan(a=ones(4, 3, dtype="complex64")), TypeError, f"a has dtype complex64; {REAL}"),
    (scan(dt=ones(2, 5, 3)), ValueError, "dt has shape (2, 5, 3); expected (b, t, d)"),
    (scan(a=ones(3, 4)), ValueError, "a has shape (3, 4); expected (d, n)"),
    (scan(b=ones(2, 5, 3)), ValueError, "b has shape (2, 5, 3); expected (b, t, g, n)"),
    (scan(c=ones(2, 5, 1, 2)), ValueError, "c has shape (2, 5, 1, 2); expected (b, t, g, n)"),
    (scan(b=ones(2, 5, 3, 3), c=ones(2, 5, 3, 3)), ValueError, "b has 3 groups, x has 4 channels"),
    (scan(b=ones(2, 5, 0, 3), c=ones(2, 5, 0, 3)), ValueError, "b has 0 groups, x has 4 channels"),
    (scan(skip=ones(3)), ValueError, "skip has shape (3,); expected (d)"),
    (scan(gate=ones(2, 4, 4)), ValueError, "gate has shape (2, 4, 4); expected (b, t, d)"),
    (scan(dt_bias=ones(1, 4)), ValueError, "dt_bias has shape (1, 4); expected (d)"),
    (scan(initial_state=ones(2, 3, 4)), ValueError, "initial_state has shape (2, 3, 4); expected (b, d, n)"),
    (scan(segment_ids=ones(5, 2, dtype="int32")), ValueError, "segment_ids has shape (5, 2)"),
    (scan(impl="pallas"), ValueError, "impl='pallas' is not an implementation of selective_scan"),
]
GATED_LINEAR_ATTENTION = [
    (gla(q=ones(2, 5, 2, 4, dtype="int32")), TypeError, f"q has dtype int32; {REAL}"),
    (gla(v=ones(2, 5, 2, 4, dtype="complex64")), TypeError, f"v has dtype complex64; {REAL}"),
    (gla(q=ones(2, 5, 8)), ValueError, "q has shape (2, 5, 8); expected (b, t, h_q, k)"),
    (gla(k=ones(2, 5, 2, 3)), ValueError, "k has shape (2, 5, 2, 3); expected (b, t, h_k, k)"),
    (gla(v=ones(2, 6, 2, 4)), ValueError, "v has shape (2, 6, 2, 4); expected (b, t, h_v, v)"),
    (gla(k=ones(2, 5, 3, 4)), ValueError, "heads; expected a count that divides the largest, 3"),
    (
        gla(log_decay=-ones(2, 5)),
        ValueError,
        "log_decay has shape (2, 5); expected (h,), (b, t, h) or (b, t, h, k)",
    ),
    (
        gla(log_decay=-ones(2, 5, 2, 3)),
        ValueError,
        "log_decay has shape (2, 5, 2, 3); expected (b|1, t|1, h, k)",
    ),
    (gla(log_decay=-ones(2, dtype="int32")), TypeError, f"log_decay has dtype int32; {REAL}"),
    (gla(bonus=ones(2, 3)), ValueError, "bonus has shape (2, 3); expected (h, k)"),
    (
        gla(initial_state=ones(2, 2, 4)),
        ValueError,
        "initial_state has shape (2, 2, 4); expected (b, h, k, v)",
    ),
    (
        gla(initial_state=ones(2, 2, 4, 4), normalize=True),
        ValueError,
        "expected (b, h, k, v + 1) = (2, 2, 4, 5)",
    ),
    (gla(scale=2.0, normalize=True), ValueError, "scale=2.0 has no effect with normalize=True"),
    (gla(segment_ids=ones(2, dtype="int32")), ValueError, "segment_ids has shape (2,); expected (b, t)"),
    (gla(impl="triton"), ValueError, "impl='triton' is not an implementation of gated_linear_attention"),
]
DELTA_RULE = [
    (delta(q=ones(2, 5, 2, 4, dtype="int32")), TypeError, f"q has dtype int32; {REAL}"),
    (delta(k=ones(2, 5, 2, 3)), ValueError, "k has shape (2, 5, 2, 3); expected (b, t, g, k)"),
    (delta(v=ones(2, 5, 3, 4), beta=ones(2, 5, 3)), ValueError, "q and k have 2 heads, v has 3"),
    (delta(beta=ones(2, 5, 2, 1)), ValueError, "beta has shape (2, 5, 2, 1); expected (b, t, h)"),
    (delta(beta=ones(2, 5)), ValueError, "beta has shape (2, 5); expected (b, t, h)"),
    (delta(log_decay=-ones(2)), ValueError, "log_decay has shape (2,); expected (b, t, h) or (b, t, h, k)"),
    (delta(log_decay=-ones(2, 4, 2)), ValueError, "log_decay has shape (2, 4, 2); expected (b, t, h)"),
    (
        delta(initial_state=ones(2, 2, 4, 3)),
        ValueError,
        "initial_state has shape (2, 2, 4, 3); expected (b, h, k, v)",
    ),
    (delta(segment_ids=ones(2, 5, 1, dtype="int32")), ValueError, "segment_ids has shape (2, 5, 1)"),
    (delta(impl="wy"), ValueError, "impl='wy' is not an implementation of delta_rule"),
    (dplr(a=ones(2, 5, 2, 3)), ValueError, "a has shape (2, 5, 2, 3); expected (b, t, h, k)"),
    (dplr(b=ones(2, 5, 1, 4)), ValueError, "b has shape (2, 5, 1, 4); expected (b, t, h, k)"),
    (dplr(b=ones(2, 5, 2, 4, dtype="int32")), TypeError, f"b has dtype int32; {REAL}"),
    (dplr(v=ones(2, 5, 1, 4)), ValueError, "v has shape (2, 5, 1, 4); expected (b, t, h, v)"),
    (dplr(impl="tpu"), ValueError, "impl='tpu' is not an implementation of dplr_delta_rule"),
]
CONVOLUTIONS = [
    (convolution(x=WHOLE), TypeError, f"x has dtype int32; {FLOAT}"),
    (convolution(kernel=ones(3, 5)), ValueError, "kernel has shape (3, 5); expected (d, l)"),
    (convolution(kernel=ones(5)), ValueError, "kernel has shape (5,); expected (d, l)"),
    (convolution(kernel=ones(4, 0)), ValueError, "kernel has shape (4, 0); expected at least one tap"),
    (convolution(skip=ones(5)), ValueError, "skip has shape (5,); expected (d)"),
    (convolution(input_gate=ones(2, 5)), ValueError, "input_gate has shape (2, 5); expected (b, t, d)"),
    (convolution(output_gate=ones(1, 5, 4)), ValueError, "output_gate has shape (1, 5, 4)"),
    (
        convolution(initial_state=ones(2, 5, 4)),
        ValueError,
        "initial_state has shape (2, 5, 4); expected (b, s, d)",
    ),
    (
        convolution(initial_state=ones(2, 4, 4), circular=True),
        ValueError,
        "a circular convolution has no state",
    ),
    (convolution(partial=0), ValueError, "partial=0; expected 1 to 5 for a kernel of 5 taps"),
    (convolution(frequencies=7), ValueError, "frequencies=7; expected 1 to 6 for a kernel of 5 taps"),
    (convolution(frequencies=2, circular=True), ValueError, "frequencies=2 is given with circular=True"),
    (
        convolution(impl="gpu"),
        ValueError,
        "impl='gpu' of long_conv cannot take this call: x has dtype float32",
    ),
    (convolution(impl="cudnn"), ValueError, "impl='cudnn' is not an implementation of long_conv"),
    (taps(x=WHOLE), TypeError, f"x has dtype int32; {REAL}"),
    (taps(weight=ones(4, 3)), ValueError, "weight has shape (4, 3); expected (w, d)"),
    (taps(weight=ones(1, 4)), ValueError, "weight has 1 taps; expected 2 to"),
    (taps(weight=ones(99, 4)), ValueError, "see long_conv for longer ones"),
    (taps(bias=ones(3)), ValueError, "bias has shape (3,); expected (d)"),
    (taps(activation="gelu"), ValueError, "activation='gelu'; expected None or 'silu'"),
    (taps(initial_state=ones(2, 4, 4)), ValueError, "initial_state has shape (2, 4, 4); expected (b, m, d)"),
    (
        taps(segment_ids=ones(2, 5, dtype="bool")),
        TypeError,
        "segment_ids has dtype bool; expected an integer type",
    ),
    (taps(impl="gpuu"), ValueError, "impl='gpuu' is not an implementation of short_conv"),
    (kernel(length=-1), ValueError, "length is -1; expected 0 or more"),
    (kernel(discretization="zho"), ValueError, "discretization is 'zho'; expected one of"),
    (kernel(truncated=True), ValueError, "truncated is set without p"),
    (kernel(p=ones(4, 3, 1)), ValueError, "p is given with discretization='zoh' and conjugate_pairs=True"),
    (kernel(dt=ones(3)), ValueError, "a has shape (4, 3); expected (d|1, n) with d=3"),
    (kernel(c=ones(4, 2)), ValueError, "c has shape (4, 2)"),
    (kernel(impl="fft"), ValueError, "impl='fft' is not an implementation of ssm_kernel"),
]
ATTENTION = [
    (softmax(q=ones(2, 5, 2, 4, dtype="int32")), TypeError, "q has dtype int32"),
    (softmax(q=ones(2, 5, 8)), ValueError, "q has shape (2, 5, 8)"),
    (softmax(k=ones(2, 5, 2, 3)), ValueError, "k has shape (2, 5, 2, 3)"),
    (softmax(v=ones(2, 4, 2, 4)), ValueError, "v has shape (2, 4, 2, 4)"),
    (softmax(k=ones(2, 5, 3, 4), v=ones(2, 5, 3, 4)), ValueError, "heads"),
    (softmax(segment_ids=ones(2, 4, dtype="int32")), ValueError, "segment_ids"),
    (softmax(segment_ids=ones(2, 5)), TypeError, "segment_ids has dtype float32"),
    (softmax(mask=Mask(window=0), causal=True), ValueError, "window=0; expected"),
    (softmax(mask=Mask(window=-3), causal=True), ValueError, "window=-3"),
    (softmax(mask=Mask(sink_tokens=-1)), ValueError, "sink_tokens=-1"),
    (softmax(logits=Logits(bias=ones(2, 5, 5))), ValueError, "bias has shape (2, 5, 5)"),
    (softmax(logits=Logits(logit_cap=0.0)), ValueError, "logit_cap=0.0; expected a positive number"),
    (softmax(mask=Mask(sink_tokens=2)), ValueError, "sink_tokens=2 changes nothing without window"),
    (
        softmax(mask=Mask(prefix_lengths=ones(2, dtype="int32"))),
        ValueError,
        "prefix_lengths is for causal=True",
    ),
    (softmax(mask=Mask(block_size=2)), ValueError, "block_indices and block_size go together"),
    (softmax(mask=Mask(dilation=2)), ValueError, "dilation=2 changes nothing without window; expected 1"),
    (softmax(mask=Mask(window=2, query_block_size=1)), ValueError, "query_block_size=1 needs block_indices"),
    (
        softmax(mask=Mask(global_queries=ones(2, 1, dtype="int32"))),
        ValueError,
        "global_queries changes nothing without window or block_indices",
    ),
    (
        softmax(mask=Mask(window=2, global_keys=ones(2, 1, dtype="int32"))),
        ValueError,
        "global_keys has shape (2, 1); expected (b|1, h|1, n)",
    ),
    (softmax(mask={"window": 3}), TypeError, "mask is dict; expected a Mask or None"),
    (softmax(k=ones(2, 6, 2, 4), v=ones(2, 6, 2, 4), causal=True), ValueError, "q has 5 tokens and k has 6"),
    (softmax(tokens=Tokens(q_positions=IDS)), ValueError, "q_positions and kv_positions go together"),
    (softmax(tokens=Tokens(kv_segment_ids=IDS)), ValueError, "kv_segment_ids needs segment_ids"),
    (softmax(tokens=Tokens(kv_lengths=ones(3, dtype="int32"))), ValueError, "kv_lengths has shape (3,)"),
    (softmax(impl="flash"), ValueError, "impl='flash' is not an implementation of attention"),
    (softmax(impl="cudnn"), ValueError, "impl='cudnn' of attention cannot take this call"),
]
SEGMENTS = [
    (lambda: Segments.of(IDS, padding="left"), ValueError, "padding='left'; expected 'anywhere' or 'end'"),
]
ROWS = [
    *LINEAR_RECURRENCE,
    *SELECTIVE_SCAN,
    *GATED_LINEAR_ATTENTION,
    *DELTA_RULE,
    *CONVOLUTIONS,
    *ATTENTION,
    *SEGMENTS,
]
