"""Adapting a timm model to images, and measuring the adapter.

loop.py          the schedule, the epochs, evaluation
reproducible.py  seeds and deterministic kernels
images.py        folders of images: reading, splits, transforms
digits.py        handwritten digits and a small ViT for them, which the demo and the analyses share
backbone.py      the timm model and its checkpoint
settings.py      what a run is told
run.py           prepare and fit: resumable training
run_folder.py    the run's files
evaluation.py    evaluate_adapter
ranks.py         the processes that train together; rank_batches.py divides a loader's batches among
                 them, replica.py the model
"""
