"""How many bytes lie there, and how many move?"""
