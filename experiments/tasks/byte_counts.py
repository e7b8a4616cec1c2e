"""What the frequencies of bytes alone tell of the label of a text: a baseline of tasks of classification."""

from collections.abc import Mapping

import numpy as np

from experiments.data.sequences import Sequences


def accuracy(splits: Mapping[str, Sequences], split: str, *, vocab_size: int, num_classes: int) -> float:
    """Returns the share of texts whose label is the class of "train" with the likeliest independent ids.

    The probability of an id in a class is (n + 1) / sum (n + 1), where n counts the id in the texts of that class.
    """
    train, source = splits["train"], splits[split]
    counts = np.ones((num_classes, vocab_size))
    for index, label in enumerate(train.labels):
        counts[label] += np.bincount(train[index][0], minlength=vocab_size)
    log_shares = np.log(counts / counts.sum(axis=1, keepdims=True))
    texts = (np.bincount(source[index][0], minlength=vocab_size) for index in range(len(source)))
    return float(np.mean([np.argmax(log_shares @ text) for text in texts] == source.labels))
