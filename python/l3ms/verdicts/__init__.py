"""Says whether a model meets its constraints, and what each bound costs: from fresh samples, with a stated probability of error.

`certifying` makes a certificate of a run (`certificates`, `prices`), `checking` looks at one that has not begun.
"""
