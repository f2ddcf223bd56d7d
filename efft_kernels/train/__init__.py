"""Adapting a timm model to a folder of images, and measuring the adapter.

settings.py    what a run is told
run.py         prepare and fit: resumable training
evaluation.py  evaluate_adapter
folder.py      the run's files
"""
