"""A language model over more than 20,000 words, learnt from the standard library's own sources.

The next word is predicted from the few words before it: their embeddings, one table a position,
are added, go through a tanh, and meet an output table, which gives a logit for every word of the
vocabulary. With so many classes the loss is where the time goes, and `--loss scipy` runs the same
script on SciPy's `log_softmax` and NumPy; by default both run and both times are printed.

Nothing is downloaded: the text is the `.py` files beside the `os` module, without their tests.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.special

import numbakern

WORD = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]|\n")
SKIPPED = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests"}

# (logits, labels) -> (mean loss, its gradient); may overwrite the logits.
Loss = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]


def read_words() -> list[list[str]]:
    """The words of every source file of the standard library, files in the order of their names."""
    root = Path(os.__file__).parent
    files = sorted(
        path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts)
    )
    return [WORD.findall(path.read_text("utf-8", errors="replace")) for path in files]


def encode(files: list[list[str]], size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Numbers for words: training text, held-out text (every 20th file), and the vocabulary."""
    training = [words for number, words in enumerate(files) if number % 20]
    held_out = files[::20]
    counts = Counter(word for words in training for word in words)
    # Ties in the order of the alphabet, so that every run has the same vocabulary.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = ["<unknown>", *ranked[: size - 1]]
    number = {word: index for index, word in enumerate(vocabulary)}

    def numbers(texts: list[list[str]]) -> np.ndarray:
        return np.array([number.get(word, 0) for words in texts for word in words])

    return numbers(training), numbers(held_out), vocabulary


def loss_numbakern(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and gradient in one pass; the gradient takes the place of the logits."""
    return numbakern.cross_entropy_value_and_grad(logits, labels, out=logits)


def loss_scipy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The same from SciPy's log_softmax, in as few passes as NumPy allows."""
    log_probs = scipy.special.log_softmax(logits, axis=1)
    rows = np.arange(len(labels))
    loss = -log_probs[rows, labels].mean()
    grad = np.exp(log_probs, out=log_probs)
    grad[rows, labels] -= 1
    grad *= np.float32(1 / len(labels))
    return loss, grad


LOSSES: dict[str, Loss] = {"numbakern": loss_numbakern, "scipy": loss_scipy}


class Model:
    """Embeddings of the words before, added; tanh; a logit for every word."""

    def __init__(self, words: int, context: int, width: int, rng: np.random.Generator) -> None:
        self.embedding = 0.1 * rng.standard_normal((context, words, width), dtype=np.float32)
        self.output = np.zeros((words, width), np.float32)
        self.bias = np.zeros(words, np.float32)
        # Adagrad's sums of squares: one a row of a table, one a word for the bias.
        self._squares = (
            np.full((context, words, 1), 1e-6, np.float32),
            np.full((words, 1), 1e-6, np.float32),
            np.full(words, 1e-6, np.float32),
        )

    def hidden(self, before: np.ndarray) -> np.ndarray:
        """The state that predicts the next word, from the numbers of the words before it."""
        total = self.embedding[0][before[:, 0]]
        for position in range(1, before.shape[1]):
            total += self.embedding[position][before[:, position]]
        return np.tanh(total, out=total)

    def logits(self, hidden: np.ndarray, out: np.ndarray) -> np.ndarray:
        """A logit for every word of the vocabulary, written to `out`."""
        np.matmul(hidden, self.output.T, out=out)
        out += self.bias
        return out

    def learn(self, before: np.ndarray, hidden: np.ndarray, grad: np.ndarray, rate: float) -> None:
        """Carry the gradient of the logits to the parameters, and step (Adagrad by rows)."""
        grad_hidden = grad @ self.output
        grad_hidden *= 1 - hidden * hidden
        embedding, output, bias = self._squares

        grad_output = grad.T @ hidden
        output += np.mean(np.square(grad_output), axis=1, keepdims=True)
        grad_output *= rate / np.sqrt(output)
        self.output -= grad_output

        grad_bias = grad.sum(axis=0)
        bias += np.square(grad_bias)
        self.bias -= rate * grad_bias / np.sqrt(bias)

        for position in range(before.shape[1]):
            rows, where = np.unique(before[:, position], return_inverse=True)
            summed = np.zeros((len(rows), hidden.shape[1]), np.float32)
            np.add.at(summed, where, grad_hidden)
            squares = embedding[position]
            squares[rows] += np.mean(np.square(summed), axis=1, keepdims=True)
            self.embedding[position][rows] -= rate * summed / np.sqrt(squares[rows])


def perplexity(model: Model, windows: np.ndarray, places: np.ndarray, logits: np.ndarray) -> float:
    """exp of the mean loss over windows of the held-out text."""
    total = 0.0
    for start in range(0, len(places), len(logits)):
        window = windows[places[start : start + len(logits)]]
        z = model.logits(model.hidden(window[:, :-1]), logits[: len(window)])
        total += float(numbakern.cross_entropy(z, window[:, -1], reduction="sum"))
    return math.exp(total / len(places))


def train(
    name: str, windows: np.ndarray, held_out: np.ndarray, words: int, options: argparse.Namespace
) -> None:
    """Train from the same start with one of the two losses, and print how it goes."""
    loss_of = LOSSES[name]
    rng = np.random.default_rng(options.seed)
    model = Model(words, options.context, options.width, rng)
    logits = np.empty((options.batch, words), np.float32)
    places = rng.integers(0, len(held_out), 2048)
    loss_of(logits[:1] * 0, np.zeros(1, np.int64))  # numbakern compiles at its first calls
    loss_of(logits * 0, np.zeros(len(logits), np.int64))
    print(f"\nloss by {name}")
    print(f"  step {0:4}  perplexity {perplexity(model, held_out, places, logits):8.1f}")
    in_loss = in_all = 0.0
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        window = windows[rng.integers(0, len(windows), options.batch)]
        before, labels = window[:, :-1], window[:, -1]
        hidden = model.hidden(before)
        z = model.logits(hidden, logits)
        loss_start = time.perf_counter()
        _, grad = loss_of(z, labels)
        in_loss += time.perf_counter() - loss_start
        model.learn(before, hidden, grad, options.rate)
        in_all += time.perf_counter() - start
        if step % max(1, options.steps // 5) == 0:
            value = perplexity(model, held_out, places, logits)
            print(f"  step {step:4}  perplexity {value:8.1f}", flush=True)
    print(
        f"  {in_all / options.steps * 1e3:.1f} ms a step, {in_loss / options.steps * 1e3:.1f} ms "
        f"of it in the loss: {in_loss / in_all:.0%}"
    )


def main() -> None:
    """Read, train with one loss or with both, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=[*LOSSES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--words", type=int, default=25_000, help="size of the vocabulary")
    parser.add_argument("--context", type=int, default=3, help="words to predict from")
    parser.add_argument("--width", type=int, default=64, help="length of an embedding")
    parser.add_argument("--rate", type=float, default=0.2, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    training, held_out, vocabulary = encode(read_words(), options.words)
    known = np.count_nonzero(held_out) / len(held_out)
    print(
        f"Python {sys.version_info.major}.{sys.version_info.minor}'s standard library: "
        f"{len(training):,} words to learn from, {len(held_out):,} held out, "
        f"vocabulary of {len(vocabulary):,} ({known:.1%} of the held-out words are in it)"
    )
    view = np.lib.stride_tricks.sliding_window_view
    windows, test = (view(text, options.context + 1) for text in (training, held_out))
    for name in LOSSES if options.loss == "both" else [options.loss]:
        train(name, windows, test, len(vocabulary), options)


if __name__ == "__main__":
    main()
