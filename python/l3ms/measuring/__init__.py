"""What a model's responses come to: fresh samples on held-out prompts, and the perplexity of the task.

Never the running estimates of a training, which are of a model that moves.
"""
