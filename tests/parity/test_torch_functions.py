"""The benchmark's way to time functions of PyTorch tensors: its attention against our float64 reference."""

import jax
import pytest

from experiments.benchmark import calls
from experiments.benchmark.peers import peers
from experiments.benchmark.torch_functions import TorchFunction
from layers.kernels.suites import SUITES

NAME = "PyTorch, scaled_dot_product_attention"


@pytest.fixture(scope="module")
def attention():
    suite = SUITES["attention"]
    case = suite.benchmarks[0].resized(1, 24, 8)
    assert case.name == "causal"
    return suite, case, calls.draw(case, "float32")


def test_errors_of_a_right_and_of_a_wrong_function(attention):
    suite, case, arrays = attention
    right = peers("attention", "causal")[NAME]
    assert max(calls.errors(right, calls.check(suite, case, arrays))) < 1e-6
    wrong = TorchFunction(lambda: lambda q, k, v: 1.1 * right.load()(q, k, v))
    assert calls.errors(wrong, calls.check(suite, case, arrays)) == pytest.approx((0.1, 0.1), rel=1e-3)

    def half_gradient(q, k, v):
        return right.load()(q, k, v / 2 + v.detach() / 2)

    error, gradient_error = calls.errors(
        TorchFunction(lambda: half_gradient), calls.check(suite, case, arrays)
    )
    assert error < 1e-6
    assert gradient_error == pytest.approx(0.5, rel=1e-3)


def test_compiled_passes_can_be_waited_for(attention):
    suite, case, arrays = attention
    reference = calls.with_implementation(suite, case, "reference")
    cotangent = calls.cotangent(reference, arrays)
    compiled = peers("attention", "causal")[NAME].compiled(arrays, cotangent)
    given, direction = jax.device_put((arrays, cotangent))
    output, gradients = jax.block_until_ready(compiled.both(given, direction)).values
    assert output.shape == arrays["v"].shape
    assert set(gradients) == {"q", "k", "v"}
    assert not jax.block_until_ready(compiled.forward(given)).values.requires_grad
    assert compiled.both_peak_bytes > compiled.forward_peak_bytes >= 3 * arrays["q"].nbytes
