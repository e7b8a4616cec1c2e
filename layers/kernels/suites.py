"""The primitives as tests and benchmarks see them: one line each."""

from layers.kernels.attention import cases as attention
from layers.kernels.delta_rule import cases as delta_rule
from layers.kernels.gated_linear_attention import cases as gated_linear_attention
from layers.kernels.linear_recurrence import cases as linear_recurrence
from layers.kernels.long_conv import cases as long_conv
from layers.kernels.selective_scan import cases as selective_scan
from layers.kernels.short_conv import cases as short_conv
from layers.kernels.ssm_kernel import cases as ssm_kernel

SUITES = {
    "attention": attention.SUITE,
    "delta_rule": delta_rule.SUITE,
    "dplr_delta_rule": delta_rule.DPLR_SUITE,
    "gated_linear_attention": gated_linear_attention.SUITE,
    "linear_recurrence": linear_recurrence.SUITE,
    "long_conv": long_conv.SUITE,
    "selective_scan": selective_scan.SUITE,
    "short_conv": short_conv.SUITE,
    "ssm_kernel": ssm_kernel.SUITE,
}
