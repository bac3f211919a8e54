"""Says whether a model meets its constraints, and what each bound costs: from fresh samples, with a stated probability of error.

`certifying` makes a certificate (`certificates`, `prices`) of the `subject` that a run left, `checking` looks at a run that
has not begun, `costs` says what it will take.
"""
