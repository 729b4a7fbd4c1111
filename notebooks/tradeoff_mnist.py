# %% [markdown]
# # The trade-off on MNIST
#
# A smaller ε protects better, and takes more noise; more noise makes a poorer model. How much poorer? That is the
# question to answer before you promise anybody an ε, and one run cannot answer it. Here we train on MNIST at several
# values of ε, look at the curve, and learn how not to be fooled by it.
#
# ![On scikit-learn's digits: test accuracy against ε](../docs/tradeoff-digits.png)
#
# This is such a curve, of a small data set; below you draw that of MNIST. If ε and δ are new to you, take the
# [ten minutes](ten_minutes.ipynb) first.

# %%
import os
from pathlib import Path

import numpy as np
from IPython.display import Markdown

import dpml
from recipes.charts import accuracy_chart, find_plans, speed_chart, steps_chart, studies
from recipes.sweep import results_table, sweep

SMALL = os.environ.get("DPML_NOTEBOOKS") == "small"  # as in the tests: seconds, and a poorer model
EPSILONS = [1, 8] if SMALL else [0.5, 1, 3, 8]
SEEDS = 1 if SMALL else 2
SETTINGS = {"epochs": [5], "batch_size": [256]} if SMALL else {"epochs": [10]}
RUNS = Path("runs/tradeoff-mnist")

# %% [markdown]
# ## The data
#
# MNIST is downloaded once (11 MB) and verified. Without a network, set the environment variable `DPML_DATA` to a folder
# that has its four files; if neither is there, the next cell says so in one line, and nothing below it will run.

# %%
data, dataset = dpml.load("mnist"), "mnist"
data

# %%
if SMALL:  # a sixtieth of the records, as data of one's own
    dataset = "mnist-small.npz"
    train, test = (
        {"x_train": data.x_train, "y_train": data.y_train},
        {"x_test": data.x_test, "y_test": data.y_test},
    )
    np.savez(dataset, **{k: v[:1000] for k, v in train.items()}, **{k: v[:500] for k, v in test.items()})

# %% [markdown]
# ## A sweep
#
# `dpsgd-mnist` is a *recipe*: a complete configuration under a name (`dpml recipes` lists them all). A sweep runs it with
# each combination of the values below, and with each seed; `with_ceiling` adds its twin without privacy. We train for
# fewer epochs than the recipe would, so that this takes minutes; the README has what the recipe reaches in full.
#
# If you interrupt the cell, run it again: finished runs are not repeated. On the command line the same is
# `dpml sweep dpsgd-mnist --epsilon 0.5,1,3,8 --epochs 10 --seeds 2 --with-ceiling --output runs/tradeoff-mnist`.

# %%
runs = sweep(
    "dpsgd-mnist",
    RUNS,
    {"epsilon": EPSILONS, "dataset": [dataset], **SETTINGS},
    seeds=SEEDS,
    with_ceiling=True,
)
results_table(runs)

# %% [markdown]
# `runs` is a [Polars](https://pola.rs) table with a row for each run: every figure, and every setting under `config_…`.
# `recipes.table.read_runs("runs/tradeoff-mnist")` reads it again later.

# %%
runs.select("run", "epsilon", "noise_multiplier", "steps", "test_accuracy", "train_seconds")

# %% [markdown]
# ## The curve

# %%
[study] = studies(runs)
accuracy_chart(study)

# %% [markdown]
# How to read it:
#
# - **Left is more private.** The axis is logarithmic, since what counts is the factor $e^ε$.
# - **The dashed line is the ceiling**, the same kind of model without noise. The gap to it is the price of privacy, and
#   the ceiling has its own settings: to take the private ones would flatter privacy.
# - **Look where the curve bends.** To the right of the bend more ε buys little: do not spend it. To the left of it, a
#   little less privacy would buy a lot; if that is where your promise has to be, more records help most.
# - **Dots are seeds.** A difference that is smaller than their spread is none. Two seeds are enough for a glance, and five
#   are few enough for a claim.
#
# Here are the published results for the same data. Compare with care: networks, epochs, and even what ε refers to differ.

# %%
accuracy_chart(study, published=True)

# %% [markdown]
# ## What each step costs
#
# Every run had its ε from the start: the noise was chosen such that its whole plan costs just that. Along the way, the
# first steps cost the most.

# %%
steps_chart(find_plans([RUNS]), study.dataset)

# %% [markdown]
# ## What it costs in time
#
# More noise takes no more time: a step costs the same at every ε. What privacy asks for is larger batches.

# %%
speed_chart(study)

# %% [markdown]
# ## The catch: you have looked at all of them
#
# Suppose you publish the best of these models. Which one is best depended on all runs, and each of them saw the records. So
# what the published model tells about a record is bounded by what *all* runs cost together, not by the ε of that one.
# The sweep works that out:

# %%
Markdown((RUNS / "statement.md").read_text(encoding="utf-8"))

# %% [markdown]
# On MNIST this harms nobody. On real records there are three honest ways:
#
# - fix the settings beforehand, on public data of a similar kind, and train once;
# - `dpml tune`, which keeps the number of trials secret and publishes the best alone: dearer than one run, and the more
#   so the more it tries, but far cheaper than paying for all of them;
# - quote the ε of the whole sweep.
#
# ## Try it yourself
#
# Any field of a configuration can be an axis: `{"epsilon": [3], "clip_norm": [0.05, 0.1, 0.3]}` draws a line for each clip
# norm. `dpml chart runs/tradeoff-mnist` writes all charts, and a page to explore them, into a folder. And
# `tensorboard --logdir runs/tradeoff-mnist` shows accuracy and ε of all runs while they train.
#
# Next: [PATE against DP-SGD](pate_against_dpsgd.ipynb).
