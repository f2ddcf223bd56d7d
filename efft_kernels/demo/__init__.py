"""The demo: a small ViT trained on the digits 0 to 4, adapted to 5 to 9 in four ways."""
