"""`L3MTrainer` (`trainer`): transformers' Trainer with a constraint half-step (`constraint_step`), and checkpoints that are whole;
`fewer_samples` says which iterations sample.

`timing` says in each line of the log where the time went, by the clock of `phases`; `phase_summary` what the lines come to.
`checkpoints` are folders that exist whole or not at all, `checkpointing` makes the Trainer write them, `resuming` is what ours add.
"""
