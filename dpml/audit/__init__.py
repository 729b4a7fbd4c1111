"""Audits: empirical lower bounds on ε, from runs of the code that trains and answers.

`bounds` holds the statistics, `canaries` the records that are planted, `steps` what each step's noisy
gradient tells about noise, clipping and sampling; `dpsgd` and `pate` run the audits, `report` says what came
out, beside the accounted ε.

An audit can contradict an accounted ε; it can never prove one.
"""
