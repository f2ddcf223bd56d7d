"""Methods on models: finding the linears, attaching, merging, saving, loading, many tasks.

roles.py          what a linear is to its block, by its name and its neighbours' shapes
towers.py         what is text beside a vision tower
sites.py          the linears that targets and layers choose, with their roles, blocks and stages
coverage.py       which attention and FFN linears are adapted, and which are left
hints.py          what to pass instead, in names of the model at hand
architectures.py  what else is peculiar to a model family
attachment.py     what `attach` leaves on a model
attach.py         attach and load
peft_guard.py     why PEFT does not wrap an attached model
chain_blocks.py   the blocks that are known exactly, timm's and transformers'
chained.py        the blocks of a model that is known exactly, run as a chain
adapter.py        Adapter: what attach returns
adapter_file.py   the safetensors file and its header
adapter_set.py    AdapterSet: many tasks on one backbone
description.py    what describe() prints
"""
