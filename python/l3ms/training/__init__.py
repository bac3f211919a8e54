"""`L3MTrainer` (`trainer`): transformers' Trainer with a constraint half-step (`constraint_step`), and checkpoints that are whole;
`fewer_samples` says which iterations sample.

`checkpoints` are folders that exist whole or not at all, `checkpointing` makes the Trainer write them, `resuming` is what ours add.
"""
