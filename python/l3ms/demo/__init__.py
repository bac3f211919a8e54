"""`l3ms demo`: plain and constrained fine-tuning side by side (`comparison`), of a tiny model or of a real one.

The tiny one needs nothing but what is installed: `corpus` makes the data, `base` the model, `run` the demo. The real one is fetched when
that is allowed (`real_model`), its task is in `real`. `cached_folders` keeps both.
"""
