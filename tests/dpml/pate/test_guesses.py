"""From few answers to guesses: spreading, self-training, and which inputs to ask about."""

import torch
from torch.nn import functional

from dpml.data import load
from dpml.pate.guesses import choose_queries, first_guesses


def right(guesses, labels):
    return (guesses.argmax(dim=1) == labels).float().mean().item()


def test_twenty_typical_answers_say_nearly_all_about_digits():
    data = load("digits")
    public, labels = data.x_train[:900], data.y_train[:900]
    asked = choose_queries(public, 20)
    torch.manual_seed(0)
    guesses = first_guesses(public, asked, functional.one_hot(labels[asked], 10).float())
    assert guesses.shape == (900, 10)
    assert right(guesses, labels) > 0.85
    assert torch.allclose(guesses.sum(dim=1), torch.ones(900), atol=1e-5)
    surest = guesses.max(dim=1).values.argsort(descending=True)[:450]
    assert right(guesses[surest], labels[surest]) > right(guesses, labels)


def test_a_wrong_answer_is_outvoted_by_its_neighbours():
    data = load("digits")
    public, labels = data.x_train[:900], data.y_train[:900]
    asked = choose_queries(public, 60)
    answers = labels[asked].clone()
    answers[0] = (answers[0] + 5) % 10
    torch.manual_seed(0)
    guesses = first_guesses(public, asked, functional.one_hot(answers, 10).float())
    assert right(guesses, labels) > 0.9
    assert guesses[asked[0]].argmax() == labels[asked[0]]


def test_a_class_without_answers_is_never_guessed():
    data = load("digits")
    public, labels = data.x_train[:600], data.y_train[:600]
    asked = (labels != 3).nonzero()[:50, 0]
    torch.manual_seed(0)
    guesses = first_guesses(public, asked, functional.one_hot(labels[asked], 10).float())
    assert (guesses.argmax(dim=1) != 3).all()
