"""log_softmax, NLL and cross-entropy, forward and backward, as Numba kernels for arrays."""

from numbakern.functional.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_value_and_grad,
)
from numbakern.functional.log_softmax import log_softmax, log_softmax_backward
from numbakern.functional.logsumexp import logsumexp
from numbakern.functional.nll_loss import nll_loss, nll_loss_backward
from numbakern.functional.softmax import softmax, softmax_backward

__version__ = "0.1.0"
__all__ = [
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_value_and_grad",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "nll_loss",
    "nll_loss_backward",
    "softmax",
    "softmax_backward",
]
