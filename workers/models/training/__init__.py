"""How the packaged checkpoint is made: run `python -m workers.models.train_digits`.

Reading order: `conversations` (what is asked and answered), `augmentation` (how the scans are varied),
`architecture` (the network, its tokenizer and processor), `curriculum` (the two stages of training),
`evaluation` (held-out accuracy of the saved files), `model_card` (the figures, written down).

Nothing of this is imported when the graph runs.
"""
