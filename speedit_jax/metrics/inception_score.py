"""The Inception Score (arXiv 1606.03498): are images classified with confidence, and into many classes?"""

import numpy as np


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y|x) || p(y))), from 1 to the number of classes.

    Args:
      logits: [n, classes]. Neighbours fall into one split: shuffle those of images that are sorted by class.
      splits: into how many equal parts n >= splits images are cut; p(y) is of a part.

    Returns:
      (mean, standard deviation) over the parts.
    """
    n, scores = len(logits), []
    for i in range(splits):
        part = np.asarray(logits[i * n // splits : (i + 1) * n // splits], np.float64)
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        marginal = p.mean(axis=0)
        # 0 log 0 = 0: a class that no image of the part has at all.
        log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
