"""Looks at a training as it goes: signs of reward hacking, constraints that pull against each other; warns, stops, rolls back.

`watch` is the callback, `watched` what it asks of a training; `rules` and `held_out` judge, `snapshots` are where a run can go back to.
"""
