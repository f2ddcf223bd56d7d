"""The analyses that the papers ran, on adapters and tasks of one's own.

subspace.py             similarity of the subspaces that factors span (EFFT, Eq. 4 and Fig. 10)
fastfood.py             a random subspace of a module's parameters in memory O(D)
intrinsic_dimension.py  the smallest such subspace that learns a task (KAdaptation, section 3.2.1)
ablation.py             layers, blocks and scales (EFFT, Table 4, Figs. 7 to 9)
task.py                 what the last two train on, and how
tables.py plots.py      what they found, to look at
"""
