"""What the papers and their releases published: facts as package data, and what reads them."""
