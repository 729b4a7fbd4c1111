# %% [markdown]
# # PATE against DP-SGD
#
# There are two ways to train a classifier with differential privacy, and they ask different things of you.
#
# - **DP-SGD** trains one model on the private records, and adds noise to every gradient. It needs nothing else.
# - **PATE** deals the private records out to many *teachers*, each trained on a share of its own without any noise. The
#   teachers vote on public inputs that have no labels, noise is added to the votes, and a *student* learns from the answers.
#   One record sits with one teacher, so it moves one vote. Only the student is published, and only the answers cost.
#
# Here both get the same private records and the same ε. Which one wins depends on how many records there are to deal out.

# %%
import os
import sys
from pathlib import Path

from IPython.display import Markdown, display

import dpml
from recipes.charts import accuracy_chart, studies
from recipes.sweep import results_table, sweep
from recipes.table import read_runs

SMALL = os.environ.get("DPML_NOTEBOOKS") == "small"  # as in the tests: seconds, and without MNIST
SEEDS = 1 if SMALL else 3
RUNS = Path("runs/pate-against-dpsgd")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # finds `!dpml` below

# %% [markdown]
# ## Few records: 1,437 digits
#
# scikit-learn's handwritten digits come with it. A recipe is a complete configuration under a name, and each method has one
# for them. A sweep runs it at every ε with every seed.

# %%
EPSILONS = [8] if SMALL else [4, 8]
digits = {
    method: sweep(
        f"{method}-digits", RUNS / f"{method}-digits", {"epsilon": EPSILONS}, seeds=SEEDS, with_ceiling=True
    )
    for method in ("dpsgd", "pate")
}
for runs in digits.values():
    display(results_table(runs))

# %% [markdown]
# Charts take runs from any number of folders, so both methods share one:

# %%
[study] = studies(read_runs([RUNS / "dpsgd-digits", RUNS / "pate-digits"]))
accuracy_chart(study)

# %% [markdown]
# DP-SGD wins clearly. Thirty teachers have 48 records each, so each is weak; and noise that hides one vote of thirty
# drowns most majorities. More teachers would be weaker still, fewer would be drowned sooner.
#
# Look at the ceilings, too. PATE's is what the teachers' answers can teach a student if no noise is added at all: that is
# what dealing out the records costs on its own.
#
# ## What PATE does with a budget
#
# DP-SGD spends ε on steps. PATE spends it on *answers*, so before anything is trained you can ask what a budget buys:
# few precise answers, or many noisy ones?

# %%
# !dpml calibrate pate --epsilon 2 --delta 1e-5 --teachers 30

# %%
# !dpml calibrate pate --epsilon 2 --delta 1e-5 --teachers 250

# %% [markdown]
# One question with thirty teachers, more than a hundred with 250. A record moves one vote in either case, so the same noise
# hides it; but among 250 votes that noise overturns far fewer majorities. PATE is a method for many records: where
# enough teachers agree, an answer is cheap.
#
# ## Many records: MNIST
#
# ![Student accuracy against the number of queries](../docs/pate-frontier.png)
#
# 60,000 records make 250 teachers of 240 each. MNIST is downloaded once; without a network, set `DPML_DATA` to a folder that
# has its files. We train DP-SGD for fewer epochs than its recipe would, so that this takes minutes.

# %%
EPSILONS = [1, 2]
if not SMALL:
    dpml.load("mnist")  # says in one line if it is nowhere to be had
    for method, settings in (("dpsgd", {"epochs": [10]}), ("pate", {})):
        axes = {"epsilon": EPSILONS, **settings}
        runs = sweep(f"{method}-mnist", RUNS / f"{method}-mnist", axes, with_ceiling=True)
        display(results_table(runs))

# %%
if not SMALL:
    [study] = studies(read_runs([RUNS / "dpsgd-mnist", RUNS / "pate-mnist"]))
    display(accuracy_chart(study))

# %% [markdown]
# Now PATE holds its own: its line hardly falls towards the left, since a few dozen answers are enough for a student that
# has thousands of unlabelled images to learn from.
#
# ## Is that a fair fight?
#
# Not quite, and a statement says so. Both have the same δ and protect the same thing: one record, with the number of
# records public. But PATE's student has seen something that DP-SGD has not, 9,000 public images without labels, taken from
# the test set as in the papers. Its accuracy is measured on the images that are left, so that one image counts
# for ten times as much as for DP-SGD.
#
# This is what a student's statement promises, of a run on digits; and whether a third party may believe it:

# %%
folder = RUNS / "pate-digits" / "runs" / digits["pate"]["run"][0]
Markdown((folder / "statement.md").read_text(encoding="utf-8"))

# %%
from dpml.verify import verify_run

print(verify_run(folder).conclusion)

# %% [markdown]
# The papers quote a smaller, *data-dependent* ε for PATE: when teachers agree, an answer tells less. But that figure is
# computed from the private votes, so to publish it would leak. dpml's ε holds whatever the votes are.
#
# ## Which one for you?
#
# | | DP-SGD | PATE |
# | --- | --- | --- |
# | private records | hundreds will do | tens of thousands, to make a hundred teachers or more |
# | public inputs of the same kind, unlabelled | not needed | needed |
# | what is trained privately | any model that treats examples independently | any classifier at all |
# | what may be published | the model, after each step | the student; never the teachers |
# | tasks | anything with a loss for each example | classification |
# | ε grows with | steps | answers |
# | a stronger promise costs | accuracy, smoothly | fewer answers, until they are too few |
#
# With your own arrays, `dpml.train_pate(train_set, public_inputs, dpml.PATEConfig(epsilon=2, delta=1e-5))` is the whole call,
# and `dpml.PrivatePredictor` lets the teachers themselves answer questions until a budget is used up. How it works, and
# what did not help, is in [dpml/pate](../dpml/pate/README.md).
