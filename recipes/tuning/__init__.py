"""Hyperparameters found privately: a random number of trials, of which the best is released and paid for.

>>> from recipes.tuning import tune
>>> result = tune("dpsgd-digits", "runs/tuned", candidates={"learning_rate": [0.1, 0.3, 1.0]}, epsilon=3,
...               delta=1e-5)                                                       # doctest: +SKIP

Liu & Talwar 2019; Papernot & Steinke 2022. What has to hold is listed in `accounting.selection`. Here:

- `plan` says what is tried, with which noise, and which event that is;
- `scores` splits off the records that decide, and measures on them;
- `state` keeps the secret number of trials, and the best so far, in a folder that its owner alone can read;
- `trials` runs them, and publishes the winner.

What is not covered: the time that all trials take together. It tells whoever watches the computer, or the
dates of files, something about the number of trials, which the theory takes to be secret.
"""

from recipes.tuning.trials import tune

__all__ = ["tune"]
