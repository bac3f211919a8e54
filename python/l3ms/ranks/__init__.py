"""The processes that run one training together: what started them (`launched`), what they tell each other (`group`), whether they are at
the same place (`agreement`), and who ends them when one of them is gone, stopped, or has failed (`lookout`).
"""
