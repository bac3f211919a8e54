"""`L3MOptimizer` (`optimizer`) and what it is made of: from rewards to multipliers, from gradients to clipped steps.

`estimates` and `shifts` see where the constraints stand, `schedules` and `solvers` what a violation weighs, `clipping` what a step does;
`leaving_out` and `importance` are for training on fewer samples.
"""
