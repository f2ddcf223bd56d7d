"""The demo: a small ViT trained on the digits 0 to 4, adapted to 5 to 9 in four ways.

recipes.py   how each method is trained, and the search that chose it
run.py       the demo
report.py    its table and its report
picture.py   its picture
"""
