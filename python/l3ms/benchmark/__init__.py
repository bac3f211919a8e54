"""`l3ms bench`: the head's ops against what else there is, on the same tensors, in one process.

`shapes` says what is measured, `contestant` what can take part, `contestants` and `peers` who does, `race` measures time in interleaved
rounds and checks gradients against float64 first, `memory` measures the peak in a fresh process, `results` is what is written, `records`
how it is read, `tables` and `figure` show it. Nothing here needs pydantic: a GPU that is lent may have torch and little else.
`iterations` measures a whole iteration of `L3MTrainer` beside a `plain_loop` and `trl_steps`; it alone needs what training needs.
"""
