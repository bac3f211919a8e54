"""The fused head inside a transformers model, the losses that it computes, and the batches that it takes.

`heads` fuses, `losses` weighs, `batches` pads rows of tokens, `orders` says which rows come next, `averaging` means over iterations,
`inside_adapters` is the model that peft wraps, `pretrained` loads, `gguf_files` makes a checkpoint of a file that is for inference.
"""
