"""Recipes: functions that return complete configurations, and what is done with them.

Each takes `private=False` for its non-private twin. They are registered in the entry-point group
`dpml.recipes` as METHOD-DATASET, where `dpml train` finds a data set's defaults.
"""
