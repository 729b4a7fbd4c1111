# %% [markdown]
# # Ten minutes with a privacy budget
#
# You have records about people and a model to train on them. Whoever gets the model may try to find out from it
# whether a certain person was among the records, and what was written about them. *Differential privacy* limits how
# well anybody can do that: whatever they know already, however clever they are, now or in twenty years.
#
# In ten minutes you will train your own PyTorch model on your own arrays under a budget, read what the run promises,
# have it checked, and see what happens when the budget is used up. Nothing is downloaded.

# %%
import os
import sys
from datetime import datetime
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn

import dpml

SMALL = os.environ.get("DPML_NOTEBOOKS") == "small"  # as in the tests: seconds, and a poorer model
EPOCHS, NOISE = (10, 4.5) if SMALL else (40, 9.0)
RUNS = Path("runs") / f"ten-minutes-{datetime.now():%Y%m%d-%H%M%S}"  # each run wants a new folder
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # finds `!dpml` below

# %% [markdown]
# ## The records
#
# 569 tumours, each described by 30 measurements, and whether it was benign. Replace this cell by your own arrays: any
# numbers of shape `[n, …]`, and labels counted from 0.
#
# One thing differs from what you are used to. Scaling each column by *its* mean and spread would write two statistics
# of private records into the model, and no noise would cover them. So we scale by round limits that somebody who knows
# the instrument could have given without seeing a single patient.

# %%
x, y = load_breast_cancer(return_X_y=True)
limits = [30, 40, 200, 2500, 0.2, 0.4, 0.5, 0.2, 0.3, 0.1]  # radius, texture, perimeter, area, …
errors = [limit / 10 for limit in limits]
x = x / (limits + errors + limits) - 0.5  # the mean of each measurement, its standard error, its worst

x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=114, random_state=0, stratify=y)
data = dpml.from_arrays("tumours", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
data

# %% [markdown]
# ## The promise: ε and δ
#
# Think of two worlds: one in which your record is among the training data, and one in which it was blanked out. An
# (ε, δ) guarantee says that no outcome of training is more than $e^ε$ times as likely in one world as in the other, but
# for a chance of δ.
#
# - **ε** is how much a model may give away about a record. Below 1 is strong, and 1 to 3 is what people aim for; at 10
#   and above the promise alone says little. It is a matter of degree: no value is "private" as such.
# - **δ** is the chance that the promise fails. It has to be far below one over the number of records: with 455
#   of them, 1e-5 is fine, and 1e-2 would allow publishing somebody's record now and then.
#
# Before anything is trained you can ask what a budget means. The answer needs no data, so asking costs nothing:

# %%
# !dpml calibrate dpsgd --examples 455 --batch-size 128 --epochs {EPOCHS} --epsilon 2 --delta 1e-5

# %% [markdown]
# *noise multiplier* is how much noise training will need. The two lines on attacks may be more telling than ε:
# somebody who accuses one in a hundred of the innocent of having been in the data (a false positive rate of 0.01)
# catches at most that share of those who were. A coin that is tossed without looking at the model catches 0.01.
#
# You can start from the attack, too: which noise keeps that share below 2 %?

# %%
# !dpml calibrate dpsgd --examples 455 --batch-size 128 --epochs {EPOCHS} --attack-tpr 0.02 --attack-fpr 0.01 --delta 1e-5

# %% [markdown]
# ## Your model
#
# Any `nn.Module` will do, as long as it treats the examples of a batch independently. This one does not:

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
config = dpml.DPSGDConfig(
    epsilon=2, delta=1e-5, epochs=EPOCHS, batch_size=128, clip_norm=0.5, learning_rate=0.5
)

try:
    dpml.train_dpsgd(model, data.train_set, config)
except dpml.UserError as mistake:
    print(mistake)

# %% [markdown]
# Batch normalisation mixes the records of a batch: one of them changes the gradients of all others, so clipping each
# gradient would not bound what one record does. Nothing was trained and nothing was spent. `fix_model=True` replaces
# such layers in a copy of the model.
#
# ## Train
#
# DP-SGD is stochastic gradient descent with three changes. Every step draws its batch at random, cuts each record's
# gradient to a length of at most `clip_norm`, and adds Gaussian noise to the sum. dpml chooses the noise such that
# *all* steps together cost at most ε = 2, and refuses to start if they do not fit.

# %%
result = dpml.train_dpsgd(
    model,
    data.train_set,
    config,
    test_set=data.test_set,
    fix_model=True,
    output=RUNS / "private",
    name=data.name,
)
print(f"ε = {result.epsilon:.3f}, test accuracy {result.summary['test_accuracy']:.1%}")

# %% [markdown]
# How much of that is the price of privacy? The same model without noise is the ceiling:

# %%
free = dpml.DPSGDConfig(non_private=True, epochs=EPOCHS, batch_size=128, learning_rate=0.5)
ceiling = dpml.train_dpsgd(model, data.train_set, free, test_set=data.test_set, fix_model=True)
print(f"without privacy: test accuracy {ceiling.summary['test_accuracy']:.1%}")

# %% [markdown]
# Be careful with such figures. 114 test records are few: one of them is 0.9 %. The noise was drawn from the operating
# system's secret randomness, so a second run gives a slightly different model. And the accuracy itself was computed
# from the test records without noise; they are taken to be public.
#
# ## Read what the run says
#
# A result shows its privacy statement. It is the text to hand to a reviewer or a data protection officer, and says what is
# protected, from what, by how much, and what is *not*:

# %%
result

# %% [markdown]
# The folder keeps everything that a third party needs:

# %%
for file in sorted((RUNS / "private").iterdir()):
    print(f"{file.stat().st_size:8,} bytes  {file.name}")

# %% [markdown]
# `summary.json` is for programs. ε is there twice: `epsilon` is never below the truth, and is the one to quote;
# `epsilon_lower` is never above it, and shows how little is lost to the arithmetic.

# %%
keys = "status epsilon epsilon_lower delta neighboring_relation noise_multiplier steps test_accuracy noise_is_secret"
{key: result.summary[key] for key in keys.split()}

# %% [markdown]
# The curves are for TensorBoard: `tensorboard --logdir runs` shows ε, accuracy and speed after each step. As a picture
# right here, what each step cost:

# %%
from recipes.charts import find_plans, steps_chart

steps_chart(find_plans([RUNS]), data.name)

# %% [markdown]
# The first step costs the most, and each further one less: 142 steps cost twelve times as much as one, not 142 times.
#
# ## Do not take its word for it
#
# `privacy_events.json` lists what was released. Anybody can compute ε from it, and `dpml verify` does so with a second
# accountant that shares no code with the first. It also checks that the statement, the summary and the weights belong
# together.

# %%
# !dpml verify {RUNS / "private"}

# %% [markdown]
# It cannot know whether those events are what really ran: for that you need to trust, or read, the code that did.
#
# Once the events are there, you can ask more of them. What if three records belong to one family, and should be protected
# together?

# %%
# !dpml account --events {RUNS / "private" / "privacy_events.json"} --delta 1e-5 --group-size 3

# %% [markdown]
# That ε is much larger. A guarantee is for one *record*: where a person has several, either count them as a group, or merge
# them before training.
#
# ## A budget for everything
#
# What people need to know is not what one run costs, but what *all* releases from their records cost together. Put the
# budget into an accountant, and pass it to every run:

# %%
accountant = dpml.PrivacyAccountant(
    budget=dpml.PrivacyBudget(epsilon=3, delta=1e-5), neighboring_relation="zero-out"
)

for learning_rate in (0.2, 0.5, 1.0):
    config = dpml.DPSGDConfig(
        noise_multiplier=NOISE,
        delta=1e-5,
        epochs=EPOCHS,
        batch_size=128,
        clip_norm=0.5,
        learning_rate=learning_rate,
    )
    try:
        run = dpml.train_dpsgd(
            model, data.train_set, config, test_set=data.test_set, fix_model=True, accountant=accountant
        )
    except dpml.BudgetExceeded as refusal:
        print(refusal)
    else:
        accuracy = run.summary["test_accuracy"]
        print(
            f"learning rate {learning_rate}: {accuracy:.1%}; spent so far: ε = {accountant.epsilon(delta=1e-5):.3f}"
        )

# %% [markdown]
# Two runs together cost less than the sum of their ε. The refusal counts a little differently: which run comes next might
# depend on what earlier ones showed, and for that the accountant uses a stricter rule (a Rényi filter). A run that does not fit is refused as a whole, before its first step:
# it trains nothing and spends nothing, and what is left is still yours to spend on something smaller.
#
# Notice that trying out learning rates *is* a release: whoever sees which one won has learned something from each run.
# `dpml sweep` says what all of its runs cost together. `dpml tune` is cheaper: it keeps the number of trials secret and
# publishes the best alone.
#
# ## What you have, and what you have not
#
# You have a bound on what the model tells about any one record, to anybody, for ever. You have *not*
#
# - hidden what is true of the whole population: that large tumours are rarely benign is what the model is for;
# - protected what else was released: plots, column means, a scaler fitted on the records, the training loss;
# - protected the test records, on which accuracy was measured without noise;
# - a promise for people who are in the data more than once;
# - security: the records themselves, and the computer that they are on, are yours to guard.
#
# ## Next
#
# - [The trade-off on MNIST](tradeoff_mnist.ipynb): how accuracy depends on ε, with charts.
# - [PATE against DP-SGD](pate_against_dpsgd.ipynb): the other method, and when it is the better one.
# - The [README](../README.md) has the commands, and the training loop in parts if you want to write your own.
