"""Adapting a timm model to images, and measuring the adapter.

loop.py          the schedule, the epochs, evaluation
reproducible.py  seeds and deterministic kernels
images.py        folders of images: reading, splits, transforms
digits.py        handwritten digits and a small ViT for them, which the demo and the analyses share
backbone.py      the timm model and its checkpoint
settings.py      what a run is told
run.py           prepare and fit: resumable training
run_folder.py    the run's files
updates.py       what an update is made of: mixed images, smoothed targets, several batches
averaging.py     the moving average of what trains
curves.py        a run's curves, as a picture and for TensorBoard
trained.py       what training left, opened again, and written as a plain model
evaluation.py    evaluate_adapter
prediction.py    the classes of images
export.py        safetensors, torch.export, ONNX
ranks.py         the processes that train together; rank_batches.py divides a loader's batches among
                 them, replica.py the model
"""
