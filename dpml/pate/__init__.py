"""PATE: teachers on disjoint shards of the private records answer for a student, with noise.

`partition` gives each record to one teacher, `teachers` trains them all together, `aggregation` makes
answers of their votes, `answers` keeps them durably, `student` learns from them, `trainer` puts it together
under a budget, and `predict` serves the teachers themselves.
"""
