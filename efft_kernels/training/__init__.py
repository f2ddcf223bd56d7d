"""Adapting a timm model to a folder of images, and measuring the adapter.

loop.py        one epoch, evaluation, seeds
images.py      folders of images: reading, splits, transforms
backbone.py    the timm model and its checkpoint
settings.py    what a run is told
run.py         prepare and fit: resumable training
run_folder.py  the run's files
evaluation.py  evaluate_adapter
"""
