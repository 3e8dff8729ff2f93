"""Multinomial logistic regression on scikit-learn's handwritten digits.

Every gradient is numbakern's: the step writes it over the logits, and two matrix products carry
it to the weights. Run it with `python examples/logistic_regression.py`.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits

import numbakern


def load(held_out: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Shuffled digits, scaled to [0, 1]: training and held-out images and labels."""
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    images = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order]
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


def main() -> float:
    """Train, print, and return the accuracy on the held-out digits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay")
    parser.add_argument("--held-out", type=int, default=450, help="digits kept for the test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    images, labels, test_images, test_labels = load(options.held_out, rng)
    weights = np.zeros((images.shape[1], 10), np.float32)
    bias = np.zeros(10, np.float32)
    parameters = (weights, bias)
    velocities = (np.zeros_like(weights), np.zeros_like(bias))
    print(f"{len(images)} digits to learn from, {len(test_images)} held out")

    for epoch in range(1, options.epochs + 1):
        losses = []
        order = rng.permutation(len(images))
        for start in range(0, len(order), options.batch):
            batch = order[start : start + options.batch]
            x = images[batch]
            logits = x @ weights + bias
            loss, grad = numbakern.cross_entropy_value_and_grad(logits, labels[batch], out=logits)
            losses.append(loss)
            gradients = (x.T @ grad + options.decay * weights, grad.sum(axis=0))
            for parameter, velocity, gradient in zip(
                parameters, velocities, gradients, strict=True
            ):
                velocity *= options.momentum
                velocity -= options.rate * gradient
                parameter += velocity
        if epoch == 1 or epoch % 10 == 0:
            test_logits = test_images @ weights + bias
            test_loss = numbakern.cross_entropy(test_logits, test_labels)
            print(f"epoch {epoch:3}  loss {np.mean(losses):.4f}  held out {test_loss:.4f}")

    log_probs = numbakern.log_softmax(test_images @ weights + bias)
    accuracy = float(np.mean(log_probs.argmax(axis=1) == test_labels))
    print(f"accuracy on held-out digits: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
