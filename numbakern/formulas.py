"""The mathematics, once: small functions of operators.

Each runs unchanged on Python floats, on the CPU target's SIMD vectors and on a GPU thread's
values, because it uses nothing but operators. Names: x logits, m a row's maximum, p probabilities,
log_sum = log Σ exp(x − m). What needs exp or log lives with each target's own functions.
"""


def log_softmax_value(x, m, log_sum):
    """log softmax(x); this order, since m + log_sum rounds small differences away."""
    return (x - m) - log_sum


def nll_value(x, m, log_sum):
    """−log softmax(x), bit by bit; 0 rather than −0."""
    return (m - x) + log_sum


def softmax_grad(grad, y, dot):
    """Gradient of softmax with respect to x: y·(g − Σ g·y)."""
    return y * (grad - dot)


def cross_entropy_grad(p, scale, target):
    """Gradient of Σ_c q_c·(−log p_c), scaled: p·(scale·Σq) − scale·q."""
    return p * scale - target


def smoothed_target(p, keep, spread):
    """Label smoothing: (1 − ε)·p + ε/C."""
    return p * keep + spread
