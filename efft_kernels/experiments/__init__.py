"""The papers' experiments: benchmarks over tasks, methods and seeds, and their tables and figures.

tasks.py         the tasks, their groups, classes and other names
lists.py         the community's lists of images, "path label" by line
cell.py          one training: a task, a method, a seed
ledger.py        finished cells, a file each
benchmark.py     which cells there are, and running those that are not finished
scheduler.py     who runs them: this process, or Ray
sweep.py         settings that are tried for each task and method, and the best of them
scores.py        means over seeds, groups and tasks, beside the published
grid.py          a table of texts, for the terminal and for Markdown
tables.py        the tables of a benchmark
page.py          tables and pictures as one page for a browser
photographs.py   two small tasks in VTAB-1K's layout, and a backbone for them
figures.py       its figures, and those of the papers
paper_tables.py  the papers' tables, with what they print wrongly marked
"""
