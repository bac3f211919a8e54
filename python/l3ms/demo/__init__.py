"""`l3ms demo`: constrained fine-tuning from nothing but what is installed. `corpus` makes the data, `base` the model, `run` the demo."""
