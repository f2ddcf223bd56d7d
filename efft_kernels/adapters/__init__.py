"""Methods on models: finding the linears, attaching, merging, saving, loading, many tasks.

sites.py          names of linears to roles, blocks and stages
architectures.py  what else is peculiar to a model family
attachment.py     what `attach` leaves on a model
attach.py         attach and load
chained.py        the blocks of a model that is known exactly, run as a chain
adapter.py        Adapter: what attach returns
adapter_file.py   the safetensors file and its header
adapter_set.py    AdapterSet: many tasks on one backbone
description.py    what describe() prints
"""
