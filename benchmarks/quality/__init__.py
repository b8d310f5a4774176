"""Does training suffer, or change?"""
