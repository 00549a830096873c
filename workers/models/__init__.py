"""The models that the graph runs, as tensors in and tensors out: nothing here knows of the bus.

Reading order: `vision_language_model` (the seam), `images` (files to pixels, within limits), `transformers_adapter`
(the seam over any supported checkpoint), `packaged` and `digits/` (the packaged checkpoint and its card), then
`digits_dataset`, `train_digits` and `training/` (how it was made).
"""
