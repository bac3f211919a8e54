"""`L3MTrainer` (`trainer`): transformers' Trainer with a constraint half-step (`constraint_step`), and checkpoints that are whole;
`fewer_samples` says which iterations sample. `constrained` makes the same of other trainers: `constraining` is what all have in common,
`given_trainers` take half-steps as ours does, `own_samples` weighs those that TRL's GRPO and RLOO draw, `trl_options` refuses.

`timing` says in each line of the log where the time went, by the clock of `phases`; `phase_summary` what the lines come to.
`checkpoints` are folders that exist whole or not at all, `checkpointing` makes the Trainer write them, `resuming` is what ours add.
"""
